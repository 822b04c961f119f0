"""The page that `ralm explain --html` writes: one file that needs no network, to be read with a mouse, a finger or a keyboard.

Everything that comes from a text stands in one block of JSON whose "<" are escaped, and reaches the page as text, never as markup;
a content policy forbids the page to load anything."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from ralm.app.explaining import gains, perplexities
from ralm.app.terminal import number, plain

CSS = """
:root { color-scheme: light dark; --up: 37, 99, 200; --down: 200, 90, 20; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; }
h1 { font-size: 1.2rem; } h2 { font-size: 1rem; margin: 1rem 0 .3rem; }
main { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.5rem; align-items: start; }
@media (max-width: 50rem) { main { grid-template-columns: 1fr; } aside { position: static !important; } }
#text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
#text span { border-radius: 2px; cursor: pointer; }
#text span.on, #text span:focus { outline: 2px solid currentColor; outline-offset: 1px; }
#text:focus-within span.on { outline-width: 3px; }
aside { position: sticky; top: 1rem; border: 1px solid var(--line); border-radius: 6px; padding: .5rem 1rem 1rem; min-height: 12rem;
  max-height: calc(100vh - 4rem); overflow: auto; }
ol { padding-left: 1.4rem; } li { margin-bottom: .5rem; }
#text span.copied { text-decoration: underline 2px; text-underline-offset: 3px; }
.left { opacity: .75; } .same { font-weight: bold; text-decoration: underline; } .where { font-size: .85rem; opacity: .8; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .1rem .8rem .1rem 0; } td.n { text-align: right; }
footer { margin-top: 2rem; font-size: .8rem; opacity: .8; overflow-wrap: anywhere; }
.key span { padding: 0 .4rem; margin-right: .3rem; border-radius: 2px; }
"""

JS = """
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), panel = document.getElementById("panel");
const make = (parent, tag, words, kind) => {
  const e = document.createElement(tag); e.textContent = words; if (kind) e.className = kind; parent.append(e); return e; };
const p = x => x === null ? "none" : x >= 0.001 ? x.toFixed(3) : x.toExponential(1);
const colour = g => Math.abs(g) < 0.01 ? "" : `rgba(var(--${g > 0 ? "up" : "down"}), ${Math.min(0.6, 0.08 + Math.abs(g) / 5)})`;
let now = 0, held = false;
const spans = data.tokens.map((t, i) => {
  const s = make(text, "span", t.text); s.style.background = colour(t.gain); s.tabIndex = i ? -1 : 0;
  if (t.copied && t.copied.tokens > 2) s.classList.add("copied");
  s.setAttribute("role", "option"); s.setAttribute("aria-selected", i === 0);
  s.addEventListener("mouseenter", () => { if (!held) show(i); });
  s.addEventListener("click", () => { held = held && now === i ? false : true; show(i); s.focus(); });
  s.addEventListener("focus", () => show(i));
  return s; });
function show(i) {
  spans[now].classList.remove("on"); spans[now].tabIndex = -1; spans[now].setAttribute("aria-selected", false);
  now = i; const t = data.tokens[i], s = spans[i];
  s.classList.add("on"); s.tabIndex = 0; s.setAttribute("aria-selected", true);
  panel.replaceChildren();
  make(panel, "h2", `Token ${i + 1} of ${spans.length}: \\u201c${t.text}\\u201d`);
  make(panel, "p", `model alone ${p(t.p_lm)}, neighbours ${p(t.p_knn)}, together ${p(t.p)} ` +
    `(${t.gain >= 0 ? "+" : "\\u2212"}${Math.abs(t.gain).toFixed(2)} nats)`);
  const list = t.neighbours.length ? make(panel, "ol", "") : null;
  for (const n of t.neighbours) {
    const li = make(list, "li", ""); make(li, "span", "\\u2026" + n.left, "left");
    make(li, "span", n.target, n.target === t.text ? "same" : "");
    const how = `weight ${n.weight.toFixed(3)}, distance ${n.distance.toFixed(1)}`;
    make(li, "div", `${n.document}, character ${n.start}; ${how}`, "where"); }
  if (t.copied) make(panel, "p", `Copied: ${t.copied.tokens} token(s) up to here stand in ${t.copied.document}, characters ` +
    `${t.copied.start}\u2013${t.copied.end}`);
  for (const e of data.evidence || []) if (e.first <= i && i < e.stop && e.passages.length) {
    make(panel, "h2", e.kind === "neighbours" ? "Neighbours in force" : "Passages in force"); const ol = make(panel, "ol", "");
    for (const c of e.passages) { const li = make(ol, "li", ""); make(li, "span", c.quote, "left");
      make(li, "div", `${c.title || c.document}, ${c.document} ${c.start}\\u2013${c.end}`, "where"); } }
  if (panel.children.length === 2) make(panel, "p", "Nothing was retrieved for this token."); }
text.addEventListener("keydown", e => {
  const to = { ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + 10, ArrowUp: now - 10, Home: 0,
    End: spans.length - 1 }[e.key];
  if (to === undefined) { if (e.key === "Escape") held = false; return; }
  e.preventDefault(); spans[Math.max(0, Math.min(spans.length - 1, to))].focus(); });
if (spans.length) show(0);
"""


def page(data: dict[str, Any]) -> str:
    """A whole HTML document from the fields of `ralm explain --json`."""
    shown = {"tokens": [t | {"gain": g} for t, g in zip(data["tokens"], gains(data).tolist())],
             "evidence": data.get("evidence", [])}
    block = json.dumps(plain(shown), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
    alone, system = perplexities(data)
    rows = "".join(f"<tr><td>{escape(name)}</td><td class=n>{w:.3f}</td></tr>" for name, w in list(data["documents"].items())[:50])
    told = "; ".join(f"{k} {v}" for k, v in data["convention"].items() if v not in (None, []))
    unit = "tokens it supplied" if data["convention"].get("tokens") else "nats it moved"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>What retrieval changed</title><style>{CSS}</style></head><body>
<h1>What retrieval changed, token by token</h1>
<p>{len(data["tokens"]):,} tokens; perplexity {number(system, 2)}, the model alone {number(alone, 2)}.
<span class="key"><span style="background: rgba(var(--up), .5)">more probable</span>
<span style="background: rgba(var(--down), .5)">less probable</span></span>
Point at a token, or move with the arrow keys; a click holds it, Escape lets go.</p>
<main><section><div id="text" role="listbox" aria-label="The text, by token" aria-controls="panel"></div>
<noscript>This page needs its script to show the text.</noscript>
<h2>Documents</h2><table><tr><th>document</th><th>{unit}</th></tr>{rows}</table></section>
<aside id="panel" aria-live="polite"></aside></main>
<footer>{escape(told)}</footer>
<script type="application/json" id="data">{block}</script><script>{JS}</script></body></html>
"""
