"""RETRO's index arithmetic against loops over every token that say what is meant."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ralm.lm.chunks import (  # noqa: E402
    Layout,
    attended,
    complete,
    cross_positions,
    encoder_positions,
    readers,
    row,
)

CHUNK = st.integers(1, 6)


@given(CHUNK, st.integers(0, 40))
def test_every_token_reads_the_last_complete_chunk(m, n):
    """Said without formulas: a chunk is complete at t when all its tokens are <= t."""
    for t in range(n):
        ready = [u for u in range(n) if all(token <= t for token in range(u * m, (u + 1) * m))]
        assert attended(t, m) == (ready[-1] if ready else -1)
        assert row(t, m) == ((t - readers(attended(t, m), n, m).start) if ready else t + 1)
    assert complete(n, m) == len([u for u in range(n) if (u + 1) * m <= n])
    assert [list(readers(u, n, m)) for u in range(n // m)] == [[t for t in range(n) if attended(t, m) == u] for u in range(n // m)]


def test_arithmetic_takes_arrays():
    t = torch.arange(11)
    assert attended(t, 4).tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert row(t, 4).tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


@given(CHUNK, st.integers(1, 12))
def test_distances_are_those_of_the_paper(m, r):
    rows, tokens = cross_positions(m, r)
    assert [[q - k for k in tokens] for q in rows] == [[i - j + m - 1 for j in range(r)] for i in range(m)]
    tokens, chunk = encoder_positions(r, m)
    assert [[q - k for k in chunk] for q in tokens] == [[j - i for i in range(m)] for j in range(r)]
    # the same by places: token t of a text reads a neighbour that is thought to begin where the chunk it belongs to begins
    for t in range(m - 1, 4 * m):
        assert rows[row(t, m)] == t - attended(t, m) * m


@st.composite
def pieces(draw):
    """Chunk length, and per row the reality of each place of each piece."""
    m, rows = draw(CHUNK), draw(st.integers(1, 3))
    widths = draw(st.lists(st.integers(1, 2 * m + 2), min_size=1, max_size=3))
    padded = draw(st.booleans())
    real = [[[draw(st.booleans()) if padded else True for _ in range(w)] for w in widths] for _ in range(rows)]
    first = [draw(st.integers(0, 2 * m)) for _ in range(rows)] if draw(st.booleans()) else [draw(st.integers(0, 2 * m))] * rows
    return m, widths, real, first


@settings(max_examples=150, deadline=None)
@given(pieces())
def test_layout_in_pieces(drawn):
    """Tokens carry their own number. Whatever the phases, pieces and padding: chunks hold their tokens, groups their readers."""
    m, widths, real, first = drawn
    rows, seen = len(real), list(first)
    # what stood before the first piece: token numbers begin at 1, so that 0 can only be a gap
    held = torch.zeros(rows, m, 1)
    for b, n in enumerate(first):
        for i in range(n % m):
            held[b, i] = n - n % m + i + 1
    for p, width in enumerate(widths):
        mask = torch.tensor([real[b][p] for b in range(rows)])
        x, number = torch.full((rows, width, 1), -7.0), [n for n in seen]
        for b in range(rows):
            for place in range(width):
                if mask[b, place]:
                    number[b] += 1
                    x[b, place] = number[b]
        layout = Layout.of(m, seen, width, mask)
        assert layout.done_B.tolist() == [new // m - old // m for new, old in zip(number, seen)]
        chunks, groups, rest = layout.chunks(x, held), layout.groups(x), layout.rest(x, held)
        for b in range(rows):
            for u in range(int(layout.done_B[b])):
                begin = (seen[b] // m + u) * m
                assert chunks[b, u, :, 0].tolist() == [begin + i + 1 for i in range(m)]
            left = number[b] % m
            assert rest[b, :, 0].tolist() == [number[b] - left + i + 1 for i in range(left)] + [0] * (m - left)
            for g in range(groups.shape[1]):
                for i in range(m):
                    n = int(groups[b, g, i, 0])
                    assert n == 0 or (row(n - 1, m) == i and attended(n - 1, m) - (seen[b] // m - 1) == g)
            assert sorted(groups[b].flatten().tolist())[-(number[b] - seen[b]) or groups[b].numel():] == list(
                range(seen[b] + 1, number[b] + 1))
        back = layout.places(groups)
        assert torch.equal(back, torch.where(mask[..., None], x, 0.0))
        held, seen = rest, number


def test_slices_equal_look_ups():
    """The two ways through Layout give the same: a batch of one phase against the same rows beside one of another phase."""
    x, held = torch.randn(3, 11, 2), torch.randn(3, 4, 2)
    same, mixed = Layout.of(4, [6, 6, 6], 11), Layout.of(4, [6, 6, 7], 11)
    assert same.even == 2 and mixed.even is None
    assert torch.equal(same.chunks(x, held)[:2], mixed.chunks(x, held)[:2, :same.done])
    assert torch.equal(same.rest(x, held)[:2], mixed.rest(x, held)[:2])
    assert torch.equal(same.groups(x)[:2], mixed.groups(x)[:2, :same.done + 1])
    assert torch.equal(same.places(same.groups(x))[:2], mixed.places(mixed.groups(x))[:2])


def test_gradients_go_through_both_ways():
    for seen in ([2, 2], [2, 3]):
        x = torch.randn(2, 9, 3, requires_grad=True)
        layout = Layout.of(4, seen, 9)
        layout.places(layout.groups(x)).sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))
