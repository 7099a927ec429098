"""The look of the comparison page: one style sheet for light, dark, phone and print, and the script that enlarges."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfb; --panel: #f4f4ef; --ink: #1c2025; --faint: #5c636c; --rule: #dfe0da;
  --lora: #cf7600; --flat: #2f6fde; --base: #7b828b; --third: #0b8a6a; --fourth: #8d5aa8;
  --good: #1a7f45; --bad: #b3261e; --warn: #9a5b00;
  --serif: Charter, "Iowan Old Style", "Source Serif 4", Cambria, Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --panel: #1e2125; --ink: #e9e7e2; --faint: #a3a9b1; --rule: #33373d;
  --lora: #f0a23c; --flat: #7aa5fa; --base: #9aa1aa; --third: #3cc39d; --fourth: #c79be0;
  --good: #63c98b; --bad: #ff8a80; --warn: #f0b45a; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans);
  font-variant-numeric: tabular-nums; }
main { max-width: 1180px; margin: 0 auto; padding: 34px 32px 56px; }
a { color: inherit; text-underline-offset: 3px; text-decoration-color: var(--rule); }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--flat); outline-offset: 2px; }
h1, h2 { font-family: var(--serif); font-weight: 600; letter-spacing: -.008em; margin: 0; }
p { margin: 0; }
.faint, figcaption, .note { color: var(--faint); }

.top { display: grid; grid-template-columns: minmax(0, 1fr) 372px; gap: 4px 56px; align-items: end; }
.kicker { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 2px 20px; color: var(--faint); font-size: 13.5px; }
.kicker b { color: var(--ink); font-weight: 600; }
figure { margin: 0; }
.verdict { font-size: clamp(23px, 2.5vw, 32px); line-height: 1.22; text-wrap: pretty; padding: 8px 0 4px;
  overflow-wrap: break-word; }
.headline .row { height: 44px; }
.headline .sides { display: flex; justify-content: space-between; font-size: 12.5px; gap: 12px; }
.headline figcaption { font-size: 12.5px; margin-bottom: 4px; }
.headline figcaption b { display: block; color: var(--ink); }
nav { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13.5px; color: var(--faint);
  border-top: 1px solid var(--rule); margin-top: 14px; padding-top: 9px; }

.pictures { display: grid; grid-auto-flow: column; gap: 7px; margin-top: 16px; justify-content: start;
  grid-template-rows: auto repeat(var(--columns), auto);
  grid-template-columns: max-content repeat(var(--prompts), minmax(0, min(176px, 17.5vh))); }
.pictures .names, .pictures .prompt { display: contents; }
.names > * { align-self: center; padding-right: 12px; font-weight: 600; }
.prompt > p { font-size: 12.5px; line-height: 1.3; color: var(--faint); align-self: end; text-wrap: balance;
  overflow-wrap: anywhere; }
.prompt img, .prompt .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px;
  background: var(--panel); }
.prompt .gone { display: grid; place-items: center; color: var(--faint); font-size: 12px; }
.js .prompt img { cursor: zoom-in; }
.pictures + .note, .note { font-size: 13px; margin-top: 10px; }

section { display: grid; grid-template-columns: 216px minmax(0, 1fr); gap: 12px 40px; padding-top: 22px;
  margin-top: 44px; border-top: 1px solid var(--rule); scroll-margin-top: 8px; }
h2 { font-size: 21px; line-height: 1.25; }
section > header p { color: var(--faint); font-size: 13.5px; margin-top: 8px; }
.body > * + * { margin-top: 18px; }
h3 { font-size: 15px; margin: 0; }

table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 14px 8px 0; vertical-align: top; border-bottom: 1px solid var(--rule);
  font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
thead th { white-space: nowrap; color: var(--faint); font-size: 12.5px; vertical-align: bottom; padding-block: 0 6px; }
tbody th { font-weight: 600; }
th small, td small { display: block; font-weight: 400; font-size: 12.5px; color: var(--faint); line-height: 1.4; }
.num td { white-space: nowrap; }
code { font: 12.5px var(--mono); overflow-wrap: anywhere; }
code[title] { border-bottom: 1px dotted var(--faint); cursor: help; }
.wide { overflow-x: auto; } .wide table { width: auto; min-width: 100%; } .wide td, .wide th { white-space: nowrap; }
.dots td.plot { padding-block: 0; width: 100%; min-width: 180px; max-width: 0; }
.dots tbody td { white-space: nowrap; }
.dots tbody td:last-child { white-space: normal; } .says { min-width: 206px; }
.dots tbody th, .dots tbody td { vertical-align: middle; }
.dots tbody.rows tr:not(:last-child) > * { border-bottom: 0; }
.dots tr.axis > * { border-bottom: 1px solid var(--rule); padding-block: 0 6px; }
.dots tr.title > * { border: 0; padding: 14px 0 0; }
.dots tr.title small { display: inline; margin-left: 8px; }
.sides { color: var(--faint); display: flex; flex-wrap: wrap;
  gap: 0 12px; justify-content: space-between; font-size: 12px; line-height: 1.3; }

svg { display: block; overflow: visible; } svg text { fill: var(--faint); font: 12px var(--sans); }
svg.row { width: 100%; height: 38px; } svg.ticks { width: 100%; height: 22px; } svg.at { overflow: visible; }
svg.chart { width: 100%; height: auto; } svg .axis { fill: var(--ink); }
.grid { stroke: var(--rule); fill: none; } .rule { stroke: var(--rule); }
.zero { stroke: var(--ink); stroke-dasharray: 2 3; fill: none; }
.lora { --mine: var(--lora); } .flat { --mine: var(--flat); } .base { --mine: var(--base); }
.third { --mine: var(--third); } .fourth { --mine: var(--fourth); }
.line { stroke: var(--mine); stroke-width: 2.6; fill: none; stroke-linejoin: round; }
.line.thin { stroke-width: 1.1; opacity: .5; }
.lora .line { stroke-dasharray: 7 3.5; } .base .line { stroke-dasharray: 1.5 3.5; }
.third .line { stroke-dasharray: 10 3 2 3; } .fourth .line { stroke-dasharray: 4 2; }
.bar { stroke: var(--mine); stroke-width: 2.4; fill: none; }
.mark { fill: var(--mine); stroke: var(--paper); stroke-width: 1.2; } .mark.small { opacity: .6; }
.chips { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13.5px; }
.chip { display: inline-flex; align-items: center; gap: 7px; white-space: nowrap; } .chip svg { flex: none; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 26px 32px; }

.ok, .bad, .warn { font-weight: 600; white-space: nowrap; } .ok { color: var(--good); } .bad { color: var(--bad); }
.warn { color: var(--warn); }
.alarm { border-left: 4px solid var(--bad); padding: 8px 14px; grid-column: 1 / -1; margin: 8px 0 4px;
  background: color-mix(in srgb, var(--bad) 9%, transparent); overflow-wrap: anywhere; }
details { padding: 4px 0; } .body > details { margin-top: 8px; }
.keep { white-space: nowrap; }
summary { cursor: pointer; color: var(--faint); } summary:hover { color: var(--ink); }
details > :not(summary) { margin-top: 10px; }
.settings { columns: 2 320px; column-gap: 40px; margin: 0; font-size: 13px; }
.settings div { display: flex; justify-content: space-between; gap: 14px; break-inside: avoid;
  border-bottom: 1px solid var(--rule); padding: 3px 0; }
.settings dt { color: var(--faint); overflow-wrap: anywhere; } .settings dd { margin: 0; text-align: right;
  overflow-wrap: anywhere; max-width: 62%; }

dialog { border: 0; border-radius: 8px; padding: 20px 24px; width: min(1120px, 94vw); max-width: none;
  background: var(--paper); color: var(--ink); } dialog::backdrop { background: rgb(0 0 0 / .6); }
dialog .large { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 12px;
  margin-top: 12px; }
dialog img { width: 100%; border-radius: 4px; display: block; background: var(--panel); }
dialog figcaption { padding-top: 6px; font-weight: 600; color: var(--ink); }
dialog .bar-of-buttons { display: flex; gap: 8px; justify-content: space-between; align-items: baseline; }
button { font: inherit; font-size: 14px; color: inherit; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 5px; padding: 4px 12px; cursor: pointer; }

@media (max-width: 1060px) {
  section { grid-template-columns: minmax(0, 1fr); }
}
@media (max-width: 960px) {
  .stack thead { display: none; } .stack, .stack tbody { display: block; }
  .stack tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 4px 16px; padding: 10px 0;
    border-bottom: 1px solid var(--rule); }
  .stack th, .stack td, .dots tr.axis > * { border: 0; padding: 0; } .stack tbody th { grid-column: 1 / -1; }
  .stack tbody td, .stack tbody td:last-child { min-width: 0; white-space: normal; overflow-wrap: anywhere; }
  .stack td[data-label]::before { content: attr(data-label); display: block; font-size: 12px; color: var(--faint); }
  .stack td:empty { display: none; } .says { min-width: 0; }
  .stack td.plot, .stack td.long { grid-column: 1 / -1; width: auto; max-width: none; }
  .stack td.plot::before { display: none; }
  .stack tr.axis th, .stack tr.axis td:not(.plot) { display: none; } .stack tr.axis { padding: 0 0 10px; }
  .stack tr.title { border: 0; padding: 16px 0 0; } .dots tr.title small { display: block; margin: 0; }
  .dots tbody.rows tr:not(:last-child):not(.axis) { border: 0; }
}
@media (max-width: 760px) {
  main { padding: 22px 16px 40px; }
  .top { grid-template-columns: minmax(0, 1fr); } section { margin-top: 34px; padding-top: 18px; }
  .verdict { font-size: 23px; }
  .headline { margin-top: 10px; }
  .pictures { grid-auto-flow: row; grid-template-rows: none; gap: 5px;
    grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
  .pictures .names { display: grid; grid-template-columns: subgrid; grid-column: 1 / -1; position: sticky; top: 0;
    background: var(--paper); padding: 6px 0; z-index: 1; }
  .names > :first-child { display: none; } .names > * { padding: 0; font-size: 14px; }
  .prompt > p { grid-column: 1 / -1; margin-top: 7px; }
  .settings { columns: 1; } dialog { padding: 14px; } dialog .large { grid-auto-flow: row; }
}
@media print {
  :root { color-scheme: light; } body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  nav, dialog { display: none; } .wide { overflow: visible; } .wide table { font-size: 7.5pt; }
  .wide td, .wide th { white-space: normal; padding-right: 6px; }
  section { break-inside: auto; } tr, figure, .charts > * { break-inside: avoid; } h2 { break-after: avoid; }
}
"""

# Reading needs none of this: a picture opens large beside the others of its prompt, and print shows what is folded.
SCRIPT = """
document.documentElement.classList.add("js");
const dialog = document.getElementById("large");
const prompts = [...document.querySelectorAll(".prompt")];
let shown = 0;
function show(index) {
  shown = (index + prompts.length) % prompts.length;
  dialog.querySelector("p").textContent = prompts[shown].querySelector("p").textContent;
  dialog.querySelector(".large").replaceChildren(...[...prompts[shown].querySelectorAll("img")].map(image => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = image.dataset.arm;
    figure.append(image.cloneNode(), caption);
    return figure;
  }));
  if (!dialog.open) dialog.showModal();
}
prompts.forEach((prompt, index) => prompt.querySelectorAll("img").forEach(image => {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => show(index));
  image.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); show(index); }
  });
}));
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowRight") show(shown + 1);
  if (event.key === "ArrowLeft") show(shown - 1);
});
dialog.addEventListener("click", event => {
  const step = event.target.dataset.step;
  if (step) show(shown + Number(step));
  else if (event.target === dialog || event.target.dataset.close) dialog.close();
});
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach(part => { part.open = true; });
});
"""
