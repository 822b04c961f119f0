"""In-batch memory: gradients against finite differences, closed forms, who sees whom."""

import math

import pytest

torch = pytest.importorskip("torch")

from ralm.errors import UsageError  # noqa: E402
from ralm.train import memory  # noqa: E402
from ralm.train.memory import Seen, joint_loss, memory_nll  # noqa: E402


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", 5)


def parts(N=12, M=12, V=9, D=4, seed=0, dtype=torch.double):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, query, keys = (torch.randn(n, D, generator=g, dtype=dtype).requires_grad_() for n in (N, V, N, M))
    targets, values = (torch.randint(0, V, (n,), generator=g) for n in (N, M))
    return hidden, weight, targets, query, keys, values


def plain(hidden, weight, targets, query, keys, values, seen, temperature=1.0):
    """joint_loss by matrices and autograd."""
    scores = query @ keys.T / (math.sqrt(query.shape[1]) * temperature)
    mask = seen.mask(slice(0, len(targets)), len(values))
    return memory_nll(scores, values == targets[:, None], mask, hidden @ weight.T, targets).mean()


SEENS = [Seen("none", 0, 4), Seen("local", 0, 4), Seen("long", 0, 4), Seen("external", 0, 4),
         Seen("external", 0, 4, torch.tensor([True, False] * 6))]


@pytest.mark.parametrize("seen", SEENS)
def test_gradients(seen):
    hidden, weight, targets, query, keys, values = parts()
    of = lambda h, w, q, k: joint_loss(h, w, targets, q, k, values, seen, 1.3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(of, (hidden, weight, query, keys), atol=1e-7)
    plainly = lambda h, w, q, k: plain(h, w, targets, q, k, values, seen, 1.3)  # noqa: E731
    assert torch.autograd.gradcheck(plainly, (hidden, weight, query, keys), atol=1e-7)
    torch.testing.assert_close(of(hidden, weight, query, keys), plainly(hidden, weight, query, keys))


@pytest.mark.parametrize("seen", SEENS)
def test_it_is_the_equation(seen):
    """Sums of exponentials in a loop."""
    hidden, weight, targets, query, keys, values = parts(seed=3)
    loss, told = joint_loss(hidden, weight, targets, query, keys, values, seen)
    hidden, weight, query, keys = (x.detach() for x in (hidden, weight, query, keys))
    wanted, covered, shares, own = [], [], [], []
    for i, y in enumerate(targets.tolist()):
        e = [math.exp(float(hidden[i] @ w)) for w in weight]
        right, memory_mass, there = e[y], 0.0, False
        for j, v in enumerate(values.tolist()):
            same = i // 4 == j // 4
            looks = {"none": False, "local": same and j < i, "long": j < i,
                     "external": not same or (j < i and (seen.own_N is None or bool(seen.own_N[i])))}[seen.kind]
            if looks:
                m = math.exp(float(query[i] @ keys[j]) / 2)
                memory_mass += m
                right += m if v == y else 0
                there |= v == y
        wanted.append(-math.log(right / (sum(e) + memory_mass)))
        own.append(-math.log(e[y] / sum(e)))
        shares.append(memory_mass / (sum(e) + memory_mass))
        covered.append(there)
    mean = lambda x: pytest.approx(sum(x) / len(x))  # noqa: E731
    assert float(loss.detach()) == mean(wanted) and told == {"own": mean(own), "share": mean(shares), "covered": mean(covered)}


def test_no_memory_is_cross_entropy_and_a_perfect_one_is_nearly_certain():
    hidden, weight, targets, query, keys, _ = parts()
    loss, told = joint_loss(hidden, weight, targets, query, keys, targets, Seen("none", 0, 4))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, targets))
    assert told["share"] == 0 and told["own"] == pytest.approx(float(loss.detach())) and told["covered"] == 0
    loud = 40 * torch.eye(9, dtype=torch.double)[targets]
    loss, told = joint_loss(hidden, weight, targets, loud, loud, targets, Seen("external", 0, 1))
    assert told["covered"] == pytest.approx((targets[:, None] == targets).sum(1).gt(1).double().mean().item())
    assert told["share"] > 0.99 * told["covered"] > 0
    pairs = torch.arange(12) // 2
    loud = 40 * torch.eye(9, dtype=torch.double)[pairs]
    loss, told = joint_loss(hidden, weight, pairs, loud, loud, pairs, Seen("external", 0, 1))
    assert told["covered"] == 1 and float(loss) < 1e-6 < told["own"]


def test_without_vocabulary_nothing_right_is_infinite_without_gradient():
    scores = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    positive = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    seen = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    loss = memory_nll(scores, positive, seen)
    assert torch.isinf(loss[1:]).all()  # nothing is right; what is right is not seen
    e = scores[0].detach().exp()
    assert float(loss[0]) == pytest.approx(-math.log((e[0] + e[2]) / e[:4].sum()))
    loss[0].backward()
    assert torch.isfinite(scores.grad).all() and (scores.grad[1:] == 0).all()
    assert torch.autograd.gradcheck(lambda s: memory_nll(s, positive, seen)[:1], (scores,))


def test_overlarge_scores_stay_finite():
    hidden, weight, targets, query, keys, values = parts(dtype=torch.float32)
    loss, _ = joint_loss(hidden * 300, weight, targets, query * 300, keys, values, Seen("long", 0, 4))
    loss.backward()
    assert all(torch.isfinite(x.grad).all() for x in (hidden, weight, query, keys))


def test_part_of_a_group_sees_what_it_sees_in_the_whole():
    whole = Seen("long", 0, 4).mask(slice(0, 12), 12)
    for kind in ("local", "long", "external"):
        whole = Seen(kind, 0, 4).mask(slice(0, 12), 12)
        assert torch.equal(Seen(kind, 4, 4).mask(slice(0, 8), 12), whole[4:])
    with pytest.raises(UsageError, match="Did you mean 'external'"):
        Seen("extern", 0, 4)
