"""The style sheet of a report's page: light and dark, narrow and wide, screen and paper."""

from __future__ import annotations

# Okabe and Ito's colours, which colour-blind readers can tell apart, lighter on dark ground.
STYLE = """
:root{color-scheme:light dark;--ground:#fff;--panel:#f6f7f9;--ink:#1b1f24;--soft:#59626e;--rule:#d9dee4;
--blue:#0072b2;--orange:#c24e00;--green:#007a5a;--grey:#7a828c;--warn:#fff4e0;--warn-rule:#e69f00}
@media (prefers-color-scheme:dark){:root{--ground:#14171b;--panel:#1d2127;--ink:#e6e9ed;--soft:#a3adb8;--rule:#363d46;
--blue:#56b4e9;--orange:#ff9248;--green:#2fc79a;--grey:#98a1ab;--warn:#2e2513;--warn-rule:#e69f00}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:62rem;padding:2rem 1.25rem 3rem;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1,h2,h3{line-height:1.25;overflow-wrap:anywhere}
h1{font-size:1.7rem;margin:.2rem 0 .8rem}
h2{font-size:1.2rem;margin:0 0 .7rem}
h3{font-size:.95rem;margin:0 0 .4rem}
p{margin:.5rem 0;max-width:46rem;overflow-wrap:anywhere}
section{margin-top:2.4rem}
a{color:var(--blue)}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
pre{margin:.4rem 0 1rem;padding:.8rem 1rem;background:var(--panel);border:1px solid var(--rule);border-radius:6px;
white-space:pre-wrap}
.kind{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.04em}
.verdict{font-size:1.12rem;margin:0 0 1rem;padding:.8rem 1rem;background:var(--panel);
border-left:4px solid var(--blue);border-radius:0 6px 6px 0;max-width:none}
.soft,figcaption,caption{color:var(--soft);font-size:.88rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:0;padding:0;list-style:none;font-size:.92rem}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
caption{text-align:left;padding-bottom:.5rem;max-width:calc(100vw - 2.5rem)}
.number + :not(.number){padding-left:.9rem}
th,td{padding:.38rem .7rem .38rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th{color:var(--soft);font-weight:600;font-size:.85rem;vertical-align:bottom}
tbody th{font-weight:500;overflow-wrap:anywhere}
.groups tbody th{min-width:9rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.fused th,tr.fused td{font-weight:700}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1.2rem;margin:0;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:1rem}
.card{padding:.8rem 1rem;background:var(--panel);border:1px solid var(--rule);border-radius:6px;min-width:0}
.card h3{font-size:1rem}
.card dl{gap:.1rem .9rem;font-size:.88rem}
.beside{display:grid;grid-template-columns:minmax(0,6fr) minmax(0,5fr);gap:1.6rem;align-items:start}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.2rem;align-items:start}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.3rem;margin:.6rem 0;padding:0;list-style:none;font-size:.88rem}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend svg{flex:none}
figure{margin:0;min-width:0}
svg.chart{display:block;width:100%;max-width:34rem;height:auto}
svg text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
svg text.value{fill:var(--ink);font-weight:600}svg text.axis{fill:var(--ink)}
.grid{stroke:var(--rule);fill:none}
.line{fill:none;stroke-width:2}.line.naive{stroke:var(--grey);stroke-dasharray:6 4}.line.aligned{stroke:var(--blue)}
.spot.naive{fill:var(--grey)}.spot.aligned{fill:var(--blue)}
.spot.fused{fill:var(--orange);stroke:var(--ground);stroke-width:1}
.bar{fill:var(--grey)}.bar.fused{fill:var(--orange)}.bar.ensemble{fill:var(--green)}.bar.source{fill:var(--blue)}
.couplings{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,16.5rem),1fr));gap:1rem}
.couplings figcaption{margin-bottom:.4rem;color:var(--ink);overflow-wrap:anywhere}
.pictures{display:flex;flex-wrap:wrap;gap:.7rem}
.pictures div{font-size:.8rem;color:var(--soft)}
.pictures img{display:block;border:1px solid var(--rule);image-rendering:pixelated;background:var(--ground)}
.warnings{margin:0;padding:0;list-style:none;max-width:none}
.warnings li{margin:.5rem 0;padding:.6rem .9rem;background:var(--warn);border-left:4px solid var(--warn-rule);
border-radius:0 6px 6px 0;overflow-wrap:anywhere}
details summary{cursor:pointer;margin-bottom:.6rem}
footer{margin-top:3rem;padding-top:1rem;border-top:1px solid var(--rule);color:var(--soft);font-size:.85rem}
@media (max-width:52rem){.beside{grid-template-columns:minmax(0,1fr)}}
@media (max-width:34rem){body{padding:1.2rem 1rem 2rem}h1{font-size:1.35rem}dl{gap:.15rem .9rem}}
@media print{:root{color-scheme:light;--ground:#fff;--panel:#f6f7f9;--ink:#000;--soft:#444;--rule:#bbb;--blue:#0072b2;
--orange:#c24e00;--green:#007a5a;--grey:#7a828c;--warn:#fff4e0;--warn-rule:#e69f00}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{max-width:none;padding:0;font-size:10.5pt}nav{display:none}.scroll{overflow:visible}
figure,.card,tr,pre,.warnings li{break-inside:avoid}h2,h3{break-after:avoid}}
"""
