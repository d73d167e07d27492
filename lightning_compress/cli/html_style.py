"""The style of the report's page: one column on a phone, several where there is room."""

STYLE = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f5f3; color: #222; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 0 0 0.5rem; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
section, details, .card { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 1rem; }
section, details { margin: 1rem 0; }
summary { font-weight: 600; cursor: pointer; }
.cards { display: grid; margin-top: 1rem; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.card p { font-size: 0.9rem; color: #555; }
.card .large { font-size: 1.5rem; font-weight: 700; color: #222; margin-top: 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.85rem; color: #555; }
svg { display: block; width: 100%; height: auto; max-width: 36rem; }
.chip { display: inline-block; width: 0.9em; height: 0.9em; border-radius: 2px; margin: 0 0.3em 0 0.8em;
  background: #e3e3e3; vertical-align: -0.1em; }
.legend { font-size: 0.9rem; }
.legend .chip:first-child { margin-left: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #eee; vertical-align: top; }
.figures td, .figures thead th { text-align: right; }
.figures tbody th { text-align: left; font-weight: 500; }
.figures.plain td { text-align: left; white-space: normal; }
.figures thead th { white-space: pre-line; vertical-align: bottom; }
.figures tr > :first-child { text-align: left; }
.wide tr > :first-child { position: sticky; left: 0; background: #fff; }
td { white-space: nowrap; }
.wide div table { font-size: 0.8rem; }
.wide div th, .wide div td { padding: 0.25rem 0.4rem; }
.wide div td:last-child { white-space: normal; min-width: 12rem; }
pre { overflow: auto; font-size: 0.8rem; line-height: 1.4; max-height: 40rem; }
@media (max-width: 480px) {
  main { padding: 0.6rem; }
  section { padding: 0.8rem; }
  th, td { padding: 0.3rem; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
