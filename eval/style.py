"""The style sheet of the report: one column on phones, two on wide screens, ink on white when printed."""

STYLE = """
:root { --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff; --ground: #f8fafc;
  --before: #c2410c; --after: #0f766e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 64px; }
header { padding: 28px 0 12px; }
h1 { font-size: clamp(1.35rem, 3.6vw, 2.1rem); line-height: 1.25; margin: 6px 0 14px; letter-spacing: -0.015em;
  text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 22px 0 8px; }
p { margin: 0 0 12px; }
small { color: var(--soft); font-size: 0.8em; }
code { background: var(--ground); padding: 1px 5px; border-radius: 4px; font-size: 0.88em; }
.kicker { text-transform: uppercase; letter-spacing: 0.08em; font-size: 0.75rem; color: var(--soft); margin: 0; }
.facts { color: var(--soft); font-size: 0.92rem; }
.facts b { color: var(--ink); }
.notice { border-left: 3px solid var(--line); padding-left: 12px; color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin: 18px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; background: none;
  border: 0; padding: 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 16px; }
.card h3 { margin: 0 0 6px; font-size: 0.85rem; font-weight: 600; color: var(--soft); }
.card p { font-size: 1.35rem; margin: 0; white-space: nowrap; }
.card p b:first-child { color: var(--before); }
.card p b:last-child { color: var(--after); }
.card small { display: block; }
.arrow { color: var(--soft); padding: 0 8px; }
.badge { display: inline-block; padding: 2px 10px; border-radius: 999px; font-size: 0.85rem; font-weight: 600;
  background: #e2e8f0; color: #334155; white-space: nowrap; }
.badge.pass, .badge.passed, .badge.screening_passed { background: #ccfbf1; color: #115e59; }
.badge.fail, .badge.failed { background: #ffe4e6; color: #9f1239; }
.badge.inconclusive, .badge.incomplete { background: #fef3c7; color: #92400e; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figure img.pixels { image-rendering: pixelated; border-radius: 6px; }
figcaption { font-size: 0.88rem; color: var(--soft); padding-top: 6px; }
figcaption b { color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; vertical-align: top; padding: 8px 14px 8px 0; border-top: 1px solid var(--line); }
tr:first-child > th { border-top: 0; color: var(--soft); font-weight: 600; font-size: 0.82rem; }
.numbers td:not(:first-child) { min-width: 118px; font-variant-numeric: tabular-nums; }
.numbers td:first-child { min-width: 170px; }
.numbers small { line-height: 1.35; display: inline-block; }
.runs { font-variant-numeric: tabular-nums; } .runs td { white-space: nowrap; }
.runs td:first-child { white-space: normal; min-width: 110px; overflow-wrap: anywhere; }
.missing { color: var(--soft); max-width: 220px; }
.details th { width: 130px; color: var(--soft); font-weight: 600; }
.details tr:first-child > th { font-size: inherit; }
.details td { overflow-wrap: anywhere; }
.check { display: grid; grid-template-columns: 92px 1fr; gap: 4px 12px; padding: 12px 0;
  border-top: 1px solid var(--line); }
.check p { margin: 2px 0; } .check ul { margin: 4px 0 0; } .check small { line-height: 1.4; display: block; }
.check li small { margin-bottom: 6px; }
.missing-line { color: var(--soft); font-size: 0.88rem; margin: 4px 0 0; }
h4 { font-size: 0.92rem; margin: 14px 0 0; }
.pair + p { margin-top: 18px; }
ul { margin: 0 0 12px; padding-left: 20px; }
li { margin: 4px 0; }
@media (max-width: 520px) { section { padding: 16px 14px; } th, td { padding-right: 10px; }
  .check { grid-template-columns: 1fr; }
  .numbers td:first-child { min-width: 128px; } .numbers td:not(:first-child) { min-width: 100px; } }
@media print { body { background: white; } section, .card { break-inside: avoid; } }
"""
