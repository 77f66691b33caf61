"""The one style sheet of all pages."""

from __future__ import annotations

STYLE = """
:root {
  --paper: #fbfbf9; --card: #ffffff; --ink: #1c1e21; --soft: #5b626b; --line: #dfe1e4; --well: #f3f4f5;
  --trained: #cdeed3; --trained-ink: #0c3a1b; --mark: #8a6100; --good: #14692f; --bad: #a4241c;
  --train-line: #2a62c4; --held-line: #b4530a;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --card: #1d2024; --ink: #e6e7e9; --soft: #a0a7b0; --line: #363b42; --well: #14161a;
    --trained: #17462a; --trained-ink: #d3f5dc; --mark: #dfb75c; --good: #6fd08c; --bad: #ff8f85;
    --train-line: #7ba9f5; --held-line: #f0a35e;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
p { margin: 0 0 .75rem; }
code, pre, .tokens { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono",
  monospace; font-size: .875rem; line-height: 1.5; }
dl { display: grid; gap: .2rem; margin: 0; }
dl div { display: grid; grid-template-columns: 9rem 1fr; gap: 1rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .9rem; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: 0 0 1.25rem;
  overflow: hidden; }
.card > .head { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; align-items: baseline;
  padding: .75rem 1.1rem; border-bottom: 1px solid var(--line); }
.figures { display: flex; flex-wrap: wrap; align-items: flex-end; gap: .5rem 2.25rem; margin: 0 0 .6rem; }
.figure .name { display: block; color: var(--soft); font-size: .9rem; }
.figure .value { display: block; font-size: 3rem; line-height: 1.15; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.plain { border-collapse: collapse; margin: 0 0 .9rem; font-variant-numeric: tabular-nums; }
.plain th, .plain td { padding: .25rem 1.5rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
.plain th { color: var(--soft); font-weight: 600; font-size: .9rem; }
.plain th:first-child, .plain td:first-child { text-align: left; }
.arrow { font-size: 2.2rem; line-height: 1.4; color: var(--soft); }
.prompt { padding: .9rem 1.1rem; background: var(--well); border-bottom: 1px solid var(--line); }
.turn + .turn { margin-top: .7rem; }
.role { display: block; color: var(--soft); font-size: .8rem; font-weight: 600; margin-bottom: .15rem; }
.answers { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1px; background: var(--line); }
.answer { background: var(--card); padding: .9rem 1.1rem; min-width: 0; }
@media (min-width: 44rem) {
  .answers { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .answer.reference { grid-column: 1 / -1; }
  .single .answer.reference { grid-column: auto; }
}
@media (min-width: 68rem) {
  .answers { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .answers.single { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .answer.reference { grid-column: auto; }
  .answers.even { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
.reward { font-weight: 400; }
.best .reward { color: var(--good); }
.wide { overflow-x: auto; margin: 0 0 .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .9rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .9rem; }
.prose { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin: 0 0 .5rem; }
.code { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--well); border: 1px solid var(--line);
  border-radius: .35rem; padding: .6rem .75rem; margin: 0 0 .6rem; tab-size: 4; }
.info { display: block; color: var(--soft); font-size: .75rem; margin-bottom: .15rem; }
.none { color: var(--soft); font-style: italic; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .9rem 1.1rem; tab-size: 4; }
.trained { background: var(--trained); color: var(--trained-ink); border-radius: .15rem;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; text-decoration: none;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.ws { opacity: .6; user-select: none; -webkit-user-select: none; }
.dot { position: relative; }
.dot::before { content: "·"; position: absolute; left: 0; opacity: .6; }
.special { color: var(--soft); }
.trained .special { color: inherit; opacity: .75; }
.hidden { color: var(--mark); font-weight: 600; }
.bar { flex: 1 1 5rem; max-width: 10rem; height: .5rem; align-self: center; border-radius: .25rem;
  background: var(--line); overflow: hidden; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar span { display: block; height: 100%; background: var(--good); }
svg { width: 100%; max-width: 48rem; height: auto; font: 13px system-ui, "Liberation Sans", sans-serif; }
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --well: #f4f4f4; --trained: #d9f2de;
    --trained-ink: #000; --mark: #7a5600; --good: #14692f; --bad: #a4241c; --train-line: #2a62c4;
    --held-line: #b4530a; color-scheme: light; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2, .head, .role, .info { break-after: avoid; }
  .turn { break-inside: avoid; }
  .trained { border-bottom: 1.5px solid #14692f; }
}
""".strip()
