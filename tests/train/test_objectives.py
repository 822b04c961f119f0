"""Objectives against closed forms, finite differences, and the libraries people compare with; each learns a tiny case by heart."""

import math

import pytest

torch = pytest.importorskip("torch")

from ralm.errors import UsageError  # noqa: E402
from ralm.how.mixing import log_weights  # noqa: E402
from ralm.train.objectives import (  # noqa: E402
    PRESETS,
    STATISTICS,
    attention_mass,
    contrastive,
    distill,
    marginal,
    retrieval_utility,
    utility,
)

DIRECTIONS = ("p||q", "q||p")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def checked(f, *inputs):
    return torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in inputs])


def descended(loss, parameters, steps=300, lr=0.2):
    """Losses of the first and the last step."""
    optimiser = torch.optim.Adam(parameters, lr)
    said = []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        said.append(float(value.detach()))
    return said[0], said[-1]


# ---- contrastive --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_gradients(symmetric):
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4] = mask[2, 2] = True  # the second one names a positive: it stays
    assert checked(lambda q, d: contrastive(q, d, torch.tensor([0, 1, 2]), 0.7, mask, symmetric), drawn(3, 4), drawn(6, 4, seed=1))


def test_contrastive_is_its_formula():
    q, d, positive = drawn(3, 4), drawn(7, 4, seed=1), torch.tensor([5, 0, 2])
    s = (q @ d.T / 0.3).exp()
    expected = -sum(math.log(s[i, j] / s[i].sum()) for i, j in enumerate(positive.tolist())) / 3
    assert float(contrastive(q, d, positive, 0.3)) == pytest.approx(expected, abs=1e-12)
    columns = -sum(math.log(s[i, j] / s[:, j].sum()) for i, j in enumerate(positive.tolist())) / 3
    assert float(contrastive(q, d, positive, 0.3, symmetric=True)) == pytest.approx((expected + columns) / 2, abs=1e-12)


def test_a_masked_passage_is_as_if_it_were_not_there():
    q, d = drawn(2, 4), drawn(5, 4, seed=1)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3] = True
    without = torch.cat([d[:3], d[4:]])
    for symmetric in (False, True):
        a = contrastive(q, d, torch.tensor([0, 4]), mask_BN=mask, symmetric=symmetric)
        assert torch.allclose(a, contrastive(q, without, torch.tensor([0, 3]), symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_contrastive_is_multiple_negatives_ranking_loss(symmetric, negatives):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    q, parts = drawn(5, 8), [drawn(5, 8, seed=1 + i) for i in range(1 + negatives)]
    directions = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if symmetric else {}
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=4.0, similarity_fct=dot_score, **directions)
    inputs = [x.clone().requires_grad_() for x in (q, *parts)]
    there = theirs.compute_loss_from_embeddings(inputs, None)
    there.backward()
    mine = [x.clone().requires_grad_() for x in (q, *parts)]
    here = contrastive(mine[0], torch.cat(mine[1:]), torch.arange(5), 0.25, symmetric=symmetric)
    here.backward()
    assert float(here.detach()) == pytest.approx(float(there.detach()), abs=1e-9)
    for a, b in zip(mine, inputs):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)


def test_scores_are_not_rounded_under_autocast():
    """A cosine in bfloat16 has three digits; divided by a temperature of 0.05 that is a tenth of a nat."""
    q, d = (torch.nn.functional.normalize(drawn(6, 64, seed=i, dtype=torch.float32)) for i in (0, 1))
    expected = contrastive(q, d, torch.arange(6), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive(q, d, torch.arange(6), 0.05), expected)
        assert torch.equal(contrastive(q.bfloat16(), d.bfloat16(), torch.arange(6), 0.05),
                           contrastive(q.bfloat16().float(), d.bfloat16().float(), torch.arange(6), 0.05))


def test_contrastive_learns_by_heart():
    q, d = (drawn(6, 8, seed=i).requires_grad_() for i in (0, 1))
    first, last = descended(lambda: contrastive(q, d, torch.arange(6), symmetric=True), [q, d])
    assert first > 1 and last < 0.01


# ---- distill ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distill_gradients_and_padding(direction):
    scores, judged = drawn(3, 5), drawn(3, 5, seed=1)
    assert checked(lambda s: distill(s, judged, 0.5, 2.0, direction), scores)
    padded = torch.cat([scores, torch.full((3, 2), -math.inf)], 1).requires_grad_()
    wide = torch.cat([judged, drawn(3, 2, seed=2)], 1)
    loss = distill(padded, wide, 0.5, 2.0, direction)
    assert torch.allclose(loss, distill(scores, judged, 0.5, 2.0, direction))
    loss.backward()
    assert torch.isfinite(padded.grad).all() and not padded.grad[:, 5:].any()
    empty = torch.full((2, 3), -math.inf, requires_grad=True)
    nothing = distill(empty, drawn(2, 3), direction=direction)
    nothing.backward()
    assert float(nothing.detach()) == 0 and not empty.grad.any()


def test_distill_is_the_divergence_it_names():
    p, q = torch.softmax(drawn(4, 6) / 0.3, -1), torch.softmax(drawn(4, 6, seed=1) / 0.7, -1)
    forward = torch.nn.functional.kl_div(p.log(), q, reduction="batchmean")  # torch's: KL(q || p), mean of sums
    backward = torch.nn.functional.kl_div(q.log(), p, reduction="batchmean")
    args = (drawn(4, 6), drawn(4, 6, seed=1), 0.3, 0.7)
    assert torch.allclose(distill(*args, "q||p"), forward) and torch.allclose(distill(*args, "p||q"), backward)
    assert abs(float(distill(drawn(4, 6), drawn(4, 6)))) < 1e-12


def test_distill_reaches_scores_only():
    scores, judged = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()
    distill(scores, judged).backward()
    assert scores.grad.abs().sum() > 0 and judged.grad is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distill_learns_by_heart(direction):
    scores, judged = drawn(4, 6).requires_grad_(), 3 * drawn(4, 6, seed=1)
    first, last = descended(lambda: distill(scores, judged, direction=direction), [scores])
    assert first > 0.5 and last < 1e-3
    assert torch.equal(scores.argmax(-1), judged.argmax(-1))


# ---- utilities ----------------------------------------------------------------------------------------------------------


def test_utilities():
    logp, mask = -drawn(2, 3, 4).abs(), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    broken = logp.clone()
    broken[0, :, 2:] = -math.inf  # what does not count may be impossible
    sums = torch.stack([logp[0, :, :2].sum(-1), logp[1].sum(-1)])
    means = sums / torch.tensor([[2.0], [4.0]])
    for name, expected in (("sum", sums), ("mean", means), ("prob", sums.exp()), ("token_prob", means.exp()), ("left_out", -means)):
        torch.testing.assert_close(utility(broken, mask, name), expected)
    with pytest.raises(UsageError, match="unknown statistic"):
        utility(logp, mask, "median")


def test_the_posterior_is_what_sum_and_a_flat_prior_teach():
    logp = -drawn(2, 3, 4).abs()
    scores = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    distill(scores, utility(logp, statistic="sum"), direction="q||p").backward()
    posterior = torch.softmax(logp.sum(-1), -1)
    torch.testing.assert_close(scores.grad, (1 / 3 - posterior) / 2)  # and this is the marginal's own gradient
    marginal_scores = torch.zeros_like(scores, requires_grad=True)
    marginal(logp, log_weights(marginal_scores)).backward()
    torch.testing.assert_close(marginal_scores.grad, scores.grad)


def test_attention_mass_is_its_sum():
    weights, values = torch.softmax(drawn(2, 2, 3, 4, 5 * 6), -1).view(2, 2, 3, 4, 5, 6), drawn(2, 2, 3, 5, 6, seed=1).abs()
    mask, there = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]]), (drawn(2, 5, 6, seed=2) > -1).double()
    got = attention_mass(weights, values, mask, there)
    for b, k in ((0, 0), (0, 4), (1, 2)):
        total = sum(float(weights[b, l, h, t, k, s] * values[b, l, h, k, s] * mask[b, t] * there[b, k, s]) / 3
                    for l in range(2) for h in range(3) for t in range(4) for s in range(6))
        assert float(got[b, k]) == pytest.approx(total / (6 * 2 * float(mask[b].sum())), rel=1e-9)


def test_presets_name_what_exists():
    for name, preset in PRESETS.items():
        assert preset["statistic"] in (*STATISTICS, "given") and preset["direction"] in DIRECTIONS, name
        judged = drawn(2, 3) if preset["statistic"] == "given" else utility(-drawn(2, 3, 4).abs(), statistic=preset["statistic"])
        assert torch.isfinite(distill(drawn(2, 3), judged, preset["tau_r"], preset["tau_u"], preset["direction"]))


# ---- marginal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("over", ["batch", "tokens"])
def test_marginal_gradients(per, over):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]])
    assert checked(lambda s, l: marginal(l, log_weights(s, 0.7), mask, per, over), drawn(2, 3), -drawn(2, 3, 4, seed=1).abs())


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_marginal_is_its_formula(per):
    logp, scores, mask = -drawn(2, 3, 4).abs(), drawn(2, 3, seed=1), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    p, w = logp.exp(), torch.softmax(scores, -1)
    total = 0.0
    for b, length in ((0, 3), (1, 4)):
        if per == "sequence":
            total -= math.log(sum(w[b, k] * p[b, k, :length].prod() for k in range(3)))
        else:
            total -= sum(math.log(sum(w[b, k] * p[b, k, t] for k in range(3))) for t in range(length))
    log_w = log_weights(scores)
    assert float(marginal(logp, log_w, mask, per)) == pytest.approx(total / 2, abs=1e-9)
    assert float(marginal(logp, log_w, mask, per, "tokens")) == pytest.approx(total / 7, abs=1e-9)


def test_a_passage_gains_what_it_predicts_better_than_the_mixture():
    """REALM's closed form: d ln p(y|x) / d score = [p(y|z,x) / p(y|x) - 1] p(z|x)."""
    logp, scores = -drawn(2, 3, 4).abs(), drawn(2, 3, seed=1).requires_grad_()
    marginal(logp, log_weights(scores)).backward()
    p, w = logp.sum(-1).exp(), torch.softmax(scores.detach(), -1)
    torch.testing.assert_close(-2 * scores.grad, (p / (p * w).sum(-1, keepdim=True) - 1) * w)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_marginal_learns_which_passage_helps(per):
    logp = torch.full((2, 3, 4), -3.0, dtype=torch.float64)
    logp[0, 1] = logp[1, 2] = -0.1
    scores = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    descended(lambda: marginal(logp, log_weights(scores), per=per), [scores])
    assert scores.argmax(-1).tolist() == [1, 2] and torch.softmax(scores.detach(), -1).max(-1).values.min() > 0.99


def test_one_token_answers_teach_the_retriever():
    scores = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    for per in ("sequence", "token"):
        logp = torch.tensor([[[0.5], [0.1], [0.1]]], dtype=torch.float64).log()
        grad, = torch.autograd.grad(marginal(logp, log_weights(scores), per=per), scores)
        assert grad[0, 0] < -0.05


def test_retrieval_utility():
    logp, null = torch.full((1, 2, 3), -1.0), torch.full((1, 3), -1.5)
    flat = torch.log(torch.tensor([[0.5, 0.5]]))
    assert float(retrieval_utility(logp, flat, null)) == pytest.approx(0.5)
    null[0, 2] = -math.inf
    assert float(retrieval_utility(logp, flat, null, torch.tensor([[1, 1, 0]]))) == pytest.approx(0.5)
    assert float(retrieval_utility(logp - 1, flat, torch.full((1, 3), -1.5))) == pytest.approx(-0.5)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_marginal_is_that_of_rag_in_transformers(per):
    """Their class around tiny random weights; the loss is compared, on the same logits. init_std = 1: passages matter."""
    pytest.importorskip("transformers")
    from transformers import BartConfig, BartForConditionalGeneration, DPRConfig, DPRQuestionEncoder, RagConfig
    from transformers import RagSequenceForGeneration as Sequence
    from transformers import RagTokenForGeneration as Token

    torch.manual_seed(0)
    V, B, K = 50, 2, 3
    bart = BartConfig(vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=1,
                      bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, dropout=0.0, attention_dropout=0.0, init_std=1.0)
    dpr = DPRConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = RagConfig.from_question_encoder_generator_configs(dpr, bart, n_docs=K, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    rag = (Sequence if per == "sequence" else Token)(config=config, question_encoder=DPRQuestionEncoder(dpr).eval(),
                                                     generator=BartForConditionalGeneration(bart).eval()).eval()
    contexts, scores = torch.randint(3, V, (B * K, 7)), torch.randn(B, K, requires_grad=True)
    labels = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 9, 2, 1]])
    out = rag(context_input_ids=contexts, context_attention_mask=torch.ones_like(contexts), doc_scores=scores, labels=labels,
              decoder_input_ids=labels, n_docs=K)
    theirs = out.loss.mean()
    logp = torch.log_softmax(out.logits.detach().view(B, K, 5, V)[:, :, :-1], -1)
    logp = logp.gather(-1, labels[:, None, 1:, None].expand(B, K, 4, 1))[..., 0]
    live = scores.detach().clone().requires_grad_()
    ours = marginal(logp, log_weights(live), labels[:, 1:] != 1, per)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(live.grad, scores.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("call", [
    lambda: contrastive(drawn(2, 3), drawn(2, 3), torch.arange(2), 0.0), lambda: distill(drawn(2, 3), drawn(2, 3), -1.0),
    lambda: distill(drawn(2, 3), drawn(2, 3), direction="p|q"), lambda: marginal(drawn(1, 2, 3), drawn(1, 2), per="word"),
    lambda: marginal(drawn(1, 2, 3), drawn(1, 2), over="all")])
def test_bad_arguments_are_told(call):
    with pytest.raises(UsageError):
        call()
