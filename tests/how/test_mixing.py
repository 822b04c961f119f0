"""Properties of the mixing functions against brute force, and both marginals against transformers' own RAG classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.how.mixing import log_interpolate, log_mix_sequences, log_mix_tokens, log_posterior, log_weights


def random_mixture(seed, B=2, K=3, T=4, V=7):
    g = torch.Generator().manual_seed(seed)
    logp = torch.log_softmax(torch.randn(B, K, T, V, generator=g, dtype=torch.float64) * 2, -1)
    return logp, log_weights(torch.randn(B, K, generator=g, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), K=st.integers(1, 5), T=st.integers(1, 5))
def test_marginals_against_plain_probabilities(seed, K, T):
    logp, w = random_mixture(seed, K=K, T=T)
    p, prior = logp.exp().numpy(), w.exp().numpy()
    tokens = np.einsum("bktv,bk->btv", p, prior)
    assert np.allclose(log_mix_tokens(logp, w).exp(), tokens)
    y = torch.randint(0, 7, (2, T), generator=torch.Generator().manual_seed(seed))
    target = logp.gather(3, y[:, None, :, None].expand(-1, K, -1, -1))[..., 0]  # [B, K, T]
    sequences = (target.exp().prod(-1) * w.exp()).sum(1)
    assert torch.allclose(log_mix_sequences(target, w).exp(), sequences)
    assert torch.allclose(log_mix_tokens(target, log_posterior(w, target)).sum(-1), log_mix_sequences(target, w))
    order = torch.randperm(K)
    assert torch.allclose(log_mix_tokens(logp[:, order], w[:, order]), log_mix_tokens(logp, w))
    if T == 1:
        assert torch.allclose(log_mix_tokens(target, w)[:, 0], log_mix_sequences(target, w))
    if K == 1:
        assert torch.allclose(log_mix_tokens(logp, w), logp[:, 0])


def test_uniform_weights_are_the_mean_of_probabilities_not_of_logits():
    logp, _ = random_mixture(1)
    assert torch.allclose(log_mix_tokens(logp, log_weights(torch.zeros(2, 3, dtype=torch.float64))).exp(), logp.exp().mean(1))


def test_large_inner_products_stay_finite():
    w = log_weights(torch.tensor([[381.0, 380.0, 378.5]]))
    assert torch.isfinite(w).all() and float(w.exp().sum()) == pytest.approx(1)


def test_padding_weighs_nothing_and_a_row_of_padding_is_not_nan():
    logp, _ = random_mixture(2)
    w = log_weights(torch.tensor([[1.0, 2.0, -math.inf], [0.0, -math.inf, -math.inf]], dtype=torch.float64))
    assert torch.allclose(log_mix_tokens(logp, w)[1], logp[1, 0])
    assert torch.isneginf(log_weights(torch.full((1, 3), -math.inf))).all()


def test_mask_ignores_tokens_even_impossible_ones():
    logp, w = random_mixture(3)
    target = logp[..., 0].clone()
    target[:, :, -1] = -math.inf
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    assert torch.allclose(log_mix_sequences(target, w, mask), log_mix_sequences(target[:, :, :3], w))


def test_weights_of_half_precision_scores_are_made_in_single():
    scores = torch.tensor([[381.0, 380.0, 379.5]])
    for dtype in (torch.float16, torch.bfloat16):
        given = scores.to(dtype)
        assert log_weights(given, 0.7).dtype == torch.float32
        assert torch.allclose(log_weights(given, 0.7).double(), torch.log_softmax(given.double() / 0.7, -1), atol=1e-4)


def test_a_posterior_over_a_long_text_keeps_its_digits():
    """Thousands of nats are summed up; what tells the passages apart is far behind the point."""
    g = torch.Generator().manual_seed(7)
    logp = -8 - torch.rand(1, 1, 6000, generator=g).expand(1, 2, -1) - torch.tensor([[[0.0], [1e-4]]])
    ours = log_posterior(torch.log(torch.tensor([[0.5, 0.5]])), logp.contiguous())
    ratio = [math.fsum(logp[0, 0, :t].tolist()) - math.fsum(logp[0, 1, :t].tolist()) for t in (100, 3000, 5999)]
    assert np.allclose((ours[0, 0] - ours[0, 1])[[100, 3000, 5999]], ratio, atol=1e-4) and ratio[2] > 0.5


def test_a_past_that_no_passage_allows_leaves_the_prior():
    logp, w = torch.full((1, 2, 3), -1.0), torch.log(torch.tensor([[0.25, 0.75]]))
    logp[:, :, 1] = -math.inf
    weights = log_posterior(w, logp).exp()
    assert torch.allclose(weights, torch.tensor([[[0.25] * 3, [0.75] * 3]]))
    logp[:, 1, 1] = -1.0  # one passage allows it: the other is out from then on
    assert torch.allclose(log_posterior(w, logp).exp()[0, :, 2], torch.tensor([0.0, 1.0]))


def test_temperature_must_be_positive():
    with pytest.raises(UsageError):
        log_weights(torch.zeros(1, 2), 0.0)


def test_gradient_of_a_score_is_realms_closed_form():
    g = torch.Generator().manual_seed(4)
    scores = torch.randn(1, 5, generator=g, dtype=torch.float64, requires_grad=True)
    logp = torch.log(torch.rand(1, 5, 1, generator=g, dtype=torch.float64))
    total = log_mix_sequences(logp, log_weights(scores))
    total.backward()
    prior = torch.softmax(scores, -1).detach()
    assert torch.allclose(scores.grad, (logp[..., 0].exp() / total.exp().detach() - 1) * prior, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(lam=st.floats(0, 1))
def test_interpolation(lam):
    a, b = (torch.log_softmax(torch.randn(5, generator=torch.Generator().manual_seed(i)), -1) for i in (1, 2))
    assert torch.allclose(log_interpolate(a, b, lam).exp(), (1 - lam) * a.exp() + lam * b.exp(), atol=1e-6)
    assert torch.equal(log_interpolate(a, b, 0.0), a) and torch.equal(log_interpolate(a, b, 1.0), b)
    assert torch.allclose(log_interpolate(a, b, torch.tensor(lam)), log_interpolate(a, b, lam), atol=1e-5)


# ---- oracle: transformers' RAG classes, tiny and random ---------------------------------------------------------------

V, B, K = 50, 2, 3


@pytest.fixture(scope="module")
def rag_parts():
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        DPRConfig,
        DPRQuestionEncoder,
        RagConfig,
    )

    torch.manual_seed(0)
    bart = BartConfig(vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
                      pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, dropout=0.0,
                      attention_dropout=0.0, init_std=1.0)  # documents must matter, or any formula passes
    dpr = DPRConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    generator, encoder = BartForConditionalGeneration(bart).eval(), DPRQuestionEncoder(dpr).eval()
    config = RagConfig.from_question_encoder_generator_configs(dpr, generator.config, n_docs=K, bos_token_id=0,
                                                               pad_token_id=1, eos_token_id=2)
    context, scores = torch.randint(3, V, (B * K, 7)), torch.randn(B, K)
    labels = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 9, 2, 1]])
    return config, encoder, generator, context, scores, labels


def logp_of_targets(generator, context, labels):
    """ln p of labels[:, 1:] under every context: [B, K, T], and the mask of real tokens."""
    with torch.no_grad():
        logits = generator(input_ids=context, decoder_input_ids=labels.repeat_interleave(K, 0)).logits
    logp = torch.log_softmax(logits[:, :-1], -1).view(B, K, labels.shape[1] - 1, V)
    target = labels[:, None, 1:, None].expand(-1, K, -1, -1)
    return logp.gather(3, target)[..., 0], (labels[:, 1:] != 1).long()


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_marginals_equal_transformers_rag(rag_parts, kind):
    from transformers import RagSequenceForGeneration, RagTokenForGeneration

    config, encoder, generator, context, scores, labels = rag_parts
    cls = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}[kind]
    rag = cls(config=config, question_encoder=encoder, generator=generator).eval()
    with torch.no_grad():
        theirs = rag(context_input_ids=context, context_attention_mask=torch.ones_like(context), doc_scores=scores,
                     labels=labels, decoder_input_ids=labels, n_docs=K).loss
    logp, mask = logp_of_targets(generator, context, labels)
    w = log_weights(scores)
    ours = -(log_mix_tokens(logp, w) * mask).sum(-1) if kind == "token" else -log_mix_sequences(logp, w, mask)
    assert torch.allclose(ours, theirs.view(-1), atol=1e-4)


def test_one_token_answers_keep_their_prior():
    """A released marginal loses the document prior when one real target is left; ours moves with the scores and has a gradient."""
    logp = torch.log(torch.tensor([[[0.5], [0.1]]]))
    scores = torch.tensor([[0.0, 0.0]], requires_grad=True)
    log_mix_sequences(logp, log_weights(scores)).sum().backward()
    assert scores.grad.abs().min() > 1e-3
    sure = log_mix_sequences(logp, log_weights(torch.tensor([[3.0, 0.0]])))
    assert sure > log_mix_sequences(logp, log_weights(torch.zeros(1, 2)))
