"""How the page of a run's rows looks."""

STYLE = """
:root { --ink: #20242a; --quiet: #68707a; --paper: #fbfaf8; --card: #ffffff; --line: #dcdfe3;
  --in: #e3eef6; --in2: #d2e3f0; --out: #fdecd2; --out2: #f9dfb8; --under: #c4581c;
  --mode: #bfe3c0; --mark: #d9c8f0; --eos: #f4b6b0; --bar: #6aa3c8; --pad: #e7e8ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --quiet: #9aa2ac; --paper: #16181c;
  --card: #1d2025; --line: #343a42; --in: #1f3442; --in2: #284355; --out: #44341b; --out2: #574221;
  --under: #e58a4e;  --mode: #2c5a34; --mark: #503a72; --eos: #7a3530; --bar: #4a86ad; --pad: #2a2e34; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 28px 24px 80px; background: var(--paper);
  color: var(--ink);  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 14px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 36px 0 6px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
.quiet, small, figcaption { color: var(--quiet); font-size: 12.5px; }
.quiet { margin: 4px 0 0; max-width: 900px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 4px 10px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border-top: 0; color: var(--quiet); font-weight: 500; font-size: 12px; }
th:first-child { text-align: left; }
tbody th { font-weight: 600; }
td.bar { min-width: 180px; }
td.bar div { position: relative; height: 12px; background: var(--pad); }
td.bar b { display: block; height: 12px; background: var(--bar); }
td.bar u { position: absolute; top: -3px; height: 18px; width: 2px; background: var(--under); }
figure { margin: 18px 0 0; }
figure img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.legend { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px;
  font-size: 13px; line-height: 2; }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 6px; margin: 14px 0;
  content-visibility: auto; contain-intrinsic-size: auto 600px; }
summary { padding: 9px 12px; cursor: pointer; }
.map { display: flex; height: 8px; margin-top: 7px; width: 100%; border-radius: 2px; overflow: hidden; }
.map span { height: 8px; border-right: 1px solid var(--card); }
.map .in { background: var(--bar); }
.map .loss { background: var(--under); }
.map .pad { background: var(--pad); }
section { border-top: 1px solid var(--line); padding: 6px 12px 10px; content-visibility: auto;
  contain-intrinsic-size: auto 400px; }
h4 { margin: 0 0 4px; font-size: 13px; font-weight: 600; }
h4 em { font-style: normal; border: 1px solid var(--line); border-radius: 9px; padding: 0 7px;
  font-weight: 500; }
h4 small { font-weight: 400; margin-left: 6px; }
p { margin: 0; }
/* Inputs and targets side by side where there is room; a lone part takes the whole width. */
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 4px 14px;
  align-items: start; }
p.in, p.loss { font: 12.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding: 0 0 0 9px; }
p.in { border-left: 3px solid var(--bar); }
p.loss { border-left: 3px solid var(--under); }
i { font-style: normal; padding: 1px 0; border-radius: 2px; }
i:hover { outline: 2px solid var(--ink); }
i:empty { border-left: 2px solid var(--quiet); margin: 0 1px; }
.in i { background: var(--in); } .in i:nth-child(2n) { background: var(--in2); }
.loss i { background: var(--out); text-decoration: underline; text-decoration-color: var(--under);
  text-underline-offset: 3px; } .loss i:nth-child(2n) { background: var(--out2); }
i.m, .in i.m, .loss i.m { background: var(--mode); }
i.s, .in i.s, .loss i.s { background: var(--mark); font-weight: 700; }
i.e, .in i.e, .loss i.e { background: var(--eos); font-weight: 700; }
.pad { color: var(--quiet);
  background: repeating-linear-gradient(135deg, var(--pad) 0 6px, var(--card) 6px 12px);
  padding: 4px 12px; font-size: 12.5px; }
.legend .pad { padding: 2px 8px; }
.legend i { padding: 2px 4px; }
"""
