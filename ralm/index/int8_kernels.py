"""Compiled loops of the int8 encoder (int8.py): what stands between two matrix products, one row (token) at a time, in cache.

A float row x is kept as bytes q with a scale s and a minimum m: x ~ s*q + m. The product with a weight matrix W is then
s*(q W) + m*c + b, with c the sums of W's columns: products of integers are exact, so a row's result does not depend on the rows
beside it. Here `a` is q W in float32 [T, N], T the tokens of a batch."""

from __future__ import annotations

from functools import partial

import numpy as np

from ralm.index.compiled import compiled

LEVELS = np.float32(255)

# sums in the order that suits the processor, no care for NaN, and no check before a division: loops become SIMD. The same at every
# call on one machine
fast = partial(compiled, fastmath={"reassoc", "contract", "nsz", "nnan"}, error_model="numpy")


@fast
def quantise(x_TD, q_TD, s_T, m_T):
    """Rows of floats as bytes, each with a scale and minimum of its own."""
    for t in range(x_TD.shape[0]):
        _row(x_TD[t], q_TD[t], s_T, m_T, t)


@fast
def _row(x_D, q_D, s_T, m_T, t):
    low, high = x_D[0], x_D[0]
    for d in range(len(x_D)):
        low, high = min(low, x_D[d]), max(high, x_D[d])
    span = high - low
    inverse = LEVELS / span if span > np.float32(0) else np.float32(0)
    for d in range(len(x_D)):
        q_D[d] = np.int32((x_D[d] - low) * inverse + np.float32(0.5))
    s_T[t], m_T[t] = span / LEVELS, low


@fast
def _normalise(x_D, gamma_D, beta_D, eps):
    """Layer normalisation of one row, in place."""
    total = np.float32(0)
    for d in range(len(x_D)):
        total += x_D[d]
    mean, squares = total / np.float32(len(x_D)), np.float32(0)
    for d in range(len(x_D)):
        squares += (x_D[d] - mean) * (x_D[d] - mean)
    scale = np.float32(1) / np.sqrt(squares / np.float32(len(x_D)) + eps)
    for d in range(len(x_D)):
        x_D[d] = (x_D[d] - mean) * scale * gamma_D[d] + beta_D[d]


@fast
def embed(id_T, place_T, word_VD, place_PD, gamma_D, beta_D, eps, h_TD, q_TD, s_T, m_T):
    """The states below the first layer: word, position and type (added to the positions) embeddings, normalised."""
    for t in range(len(id_T)):
        word, place, h_D = word_VD[id_T[t]], place_PD[place_T[t]], h_TD[t]
        for d in range(len(h_D)):
            h_D[d] = word[d] + place[d]
        _normalise(h_D, gamma_D, beta_D, eps)
        _row(h_D, q_TD[t], s_T, m_T, t)


@fast
def finish(a_TN, s_T, m_T, c_N, b_N):
    """The product's value s*a + m*c + b, in place."""
    for t in range(a_TN.shape[0]):
        a_N, s, m = a_TN[t], s_T[t], m_T[t]
        for n in range(len(a_N)):
            a_N[n] = s * a_N[n] + m * c_N[n] + b_N[n]


@fast
def add_normalise(a_TD, c_D, b_D, gamma_D, beta_D, eps, h_TD, s_T, m_T, q_TD):
    """h = LayerNorm(h + value of the product), and its bytes; scales and minima are read for the product, then overwritten."""
    for t in range(a_TD.shape[0]):
        a_D, h_D, s, m = a_TD[t], h_TD[t], s_T[t], m_T[t]
        for d in range(len(h_D)):
            h_D[d] += s * a_D[d] + m * c_D[d] + b_D[d]
        _normalise(h_D, gamma_D, beta_D, eps)
        _row(h_D, q_TD[t], s_T, m_T, t)


@fast
def gelu(a_TN, s_T, m_T, c_N, b_N, q_TN, out_s, out_m):
    """GELU of the product's value, as bytes; erf is a quotient of polynomials, right to 4e-7."""
    for t in range(a_TN.shape[0]):
        a_N, s, m = a_TN[t], s_T[t], m_T[t]
        for n in range(len(a_N)):
            x = s * a_N[n] + m * c_N[n] + b_N[n]
            a_N[n] = np.float32(0.5) * x * (np.float32(1) + erf(x * np.float32(0.70710678)))
        _row(a_N, q_TN[t], out_s, out_m, t)


@fast
def erf(x):
    """The error function in float32, as Eigen has it: x P(x^2) / Q(x^2) on [-4, 4]."""
    x = min(max(x, np.float32(-4)), np.float32(4))
    y = x * x
    p = np.float32(-2.72614225801306e-10)
    p = p * y + np.float32(2.77068142495902e-08)
    p = p * y + np.float32(-2.10102402082508e-06)
    p = p * y + np.float32(-5.69250639462346e-05)
    p = p * y + np.float32(-7.34990630326855e-04)
    p = p * y + np.float32(-2.95459980854025e-03)
    p = p * y + np.float32(-1.60960333262415e-02)
    q = np.float32(-1.45660718464996e-05)
    q = q * y + np.float32(-2.13374055278905e-04)
    q = q * y + np.float32(-1.68282697438203e-03)
    q = q * y + np.float32(-7.37332916720468e-03)
    q = q * y + np.float32(-1.42647390514189e-02)
    return x * p / q


@fast
def pool(h_TD, start_B, out_BD):
    """The mean of each text's rows; text b is the rows start[b] to start[b + 1]."""
    for b in range(len(start_B) - 1):
        out_D = out_BD[b]
        for d in range(len(out_D)):
            out_D[d] = np.float32(0)
        for t in range(start_B[b], start_B[b + 1]):
            h_D = h_TD[t]
            for d in range(len(out_D)):
                out_D[d] += h_D[d]
        for d in range(len(out_D)):
            out_D[d] /= np.float32(start_B[b + 1] - start_B[b])
