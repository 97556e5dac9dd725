"""The report's page: its style, its script and the frame around its sections.

The page asks nothing of any network; its Content-Security-Policy has the browser enforce that.
"""

import html
import json

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#16191d;--soft:#5b6470;
--line:#e3e6ea;--c0:#2563eb;--c1:#d9660b;--c2:#0f9d76;--c3:#8b5cf6;--c4:#c026a3;--c5:#6b7280;--c6:#b8860b;--c7:#0891b2;
--bad:#d11a2a;--warn:#fff4e0;--code:#f0f2f5}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--bg:#0f1216;--card:#171b21;
--ink:#e7eaee;--soft:#98a2af;--line:#2a3038;--c0:#6ea8ff;--c1:#ff9e4f;--c2:#3ecfa3;--c3:#b395ff;
--c4:#f07bd8;--c5:#8b95a3;--c6:#e0b94a;--c7:#4cc9e6;--bad:#ff6b6b;--warn:#3a2c12;--code:#0f1216}}
:root[data-theme=dark]{color-scheme:dark;--bg:#0f1216;--card:#171b21;
--ink:#e7eaee;--soft:#98a2af;--line:#2a3038;--c0:#6ea8ff;--c1:#ff9e4f;--c2:#3ecfa3;--c3:#b395ff;
--c4:#f07bd8;--c5:#8b95a3;--c6:#e0b94a;--c7:#4cc9e6;--bad:#ff6b6b;--warn:#3a2c12;--code:#0f1216}
:root[data-theme=light]{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
header{display:flex;align-items:flex-start;gap:16px;margin-bottom:20px}
header div{flex:1;min-width:0}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 10px;letter-spacing:-.005em}
h3{font-size:14px;margin:0;font-weight:600}
p{margin:0 0 8px}
.note{margin-top:8px}.soft{color:var(--soft)}small,.small{font-size:13px}
button{font:inherit;font-size:12.5px;color:var(--soft);background:none;border:1px solid var(--line);
border-radius:6px;padding:2px 9px;cursor:pointer;white-space:nowrap}
button:hover{color:var(--ink);border-color:var(--soft)}
button[aria-pressed=true]{color:var(--ink);background:var(--code);border-color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.warn{background:var(--warn);border-radius:10px;padding:10px 14px;margin:0 0 14px}
.head{display:grid;grid-template-columns:minmax(0,1.15fr) minmax(0,1fr);gap:14px}
.tiles{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}
.tile{padding:12px 16px}
.tile b{display:block;font-size:22px;line-height:1.25;font-weight:650;letter-spacing:-.01em;
overflow-wrap:anywhere}
.tile b i{font-style:normal;font-size:14px;font-weight:500;
color:var(--soft);margin-left:3px}
.tile span{color:var(--soft);font-size:13px}
.tile em{display:block;font-style:normal;font-size:12.5px;
color:var(--soft)}
.head>.card:first-child{display:flex;flex-direction:column}
.head>.alone{justify-content:center}
.big{font-size:44px;line-height:1.05;font-weight:700;letter-spacing:-.025em}
.big i{font-style:normal;font-size:17px;font-weight:500;letter-spacing:0;color:var(--soft);
margin-left:6px}
.bars{display:grid;grid-template-columns:max-content minmax(0,1fr) max-content;gap:9px 12px;
align-items:center;margin-top:auto;padding-top:16px}
.bars div{height:32px;border-radius:4px;background:var(--c5);opacity:.55;min-width:2px}
.bars div.own{background:var(--c0);opacity:1}.bars b{font-weight:600}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px;margin-top:14px}
figure{margin:0;position:relative}
figure .top{display:flex;flex-wrap:wrap;align-items:center;gap:4px 14px;margin-bottom:6px}
figure .top h3{margin-right:auto}
.key{display:inline-flex;align-items:center;gap:6px;font-size:12.5px;color:var(--soft)}
.key s{display:inline-block;width:14px;height:3px;border-radius:2px;text-decoration:none}
.key s.dots{width:8px;height:8px;border-radius:50%}.key s.faint{opacity:.4;height:5px}
.key s.rule{height:0;border-top:2px dashed;background:none!important}
.plot{position:relative;touch-action:pan-y}
.plot svg{display:block;width:100%;overflow:visible}
svg text{fill:var(--soft);font-size:11.5px}
.tip{position:absolute;top:6px;pointer-events:none;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:6px 10px;font-size:12.5px;
line-height:1.45;box-shadow:0 4px 14px #0002;
white-space:nowrap;z-index:2}
.tip b{font-weight:600}.tip i{display:inline-block;width:8px;height:8px;border-radius:50%;
margin-right:6px}
.stack{display:flex;height:26px;border-radius:7px;overflow:hidden;gap:2px;margin-bottom:12px}
.stack div{min-width:2px}
.legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(255px,1fr));gap:4px 22px;
font-size:13.5px}
.legend div{display:flex;align-items:center;gap:8px}
.legend s{width:11px;height:11px;border-radius:3px}
.legend b{margin-left:auto;font-weight:600;white-space:nowrap}
.legend span:last-child{color:var(--soft);width:52px;
text-align:right;white-space:nowrap}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:right;padding:6px 12px;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:500;color:var(--soft);white-space:nowrap}
th:first-child,td:first-child,.left{text-align:left!important}
th:first-child,td:first-child{padding-left:0}th:last-child,td:last-child{padding-right:0}
tr:last-child td{border-bottom:0}td.best{font-weight:650;color:var(--c0)}
pre,code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:var(--code);border-radius:8px;padding:12px 14px;margin:8px 0 0;white-space:pre-wrap;
overflow-wrap:anywhere}
pre mark{background:none;color:var(--c0);font-weight:700}
.cut{color:var(--soft)}
details{border-top:1px solid var(--line);padding:8px 0}details:first-of-type{border-top:0}
summary{cursor:pointer;display:flex;gap:14px;align-items:baseline;list-style:none}
summary::-webkit-details-marker{display:none}
summary::before{content:"▸";color:var(--soft);transition:transform .12s}
details[open]>summary::before{transform:rotate(90deg)}
summary b{font-weight:600;white-space:nowrap}
summary code{color:var(--soft);white-space:nowrap;overflow:hidden;text-overflow:ellipsis;
min-width:0}
details[open]>summary code{visibility:hidden}
.groups{columns:3 290px;column-gap:34px;font-size:13px;padding-top:8px}
.groups section{break-inside:avoid;margin-bottom:14px}
.groups dl{display:grid;grid-template-columns:minmax(0,max-content) minmax(0,1fr);gap:1px 14px;
margin:4px 0 0}
.groups dt{color:var(--soft);overflow-wrap:anywhere}.groups dd{margin:0;overflow-wrap:anywhere}
.copy{position:relative}.copy button{position:absolute;top:9px;right:9px;background:var(--card)}
.copy pre{padding-right:76px}
.share{white-space:nowrap}.meter{display:inline-block;height:8px;border-radius:3px;background:var(--c0);margin-right:8px}
.flow{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.stage{border-top:4px solid;padding:12px 14px;display:flex;flex-direction:column}.stage h3 span{font-weight:400}
.stage b{font-size:27px;line-height:1.2;letter-spacing:-.02em;margin-top:8px}
.stage em{font-style:normal;font-size:13px;margin-bottom:8px;overflow-wrap:anywhere}.stage>:last-child{margin-top:auto}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:6px}
.under{display:block;font-size:12px;white-space:pre-wrap}
.stages td:first-child{min-width:190px}.stages td{white-space:nowrap}.stages td:first-child{white-space:normal}
.stages th{color:var(--ink);font-weight:600}.stages td em{display:block;font-size:12px}
em.up,em.down,em.same{font-style:normal;color:var(--soft)}em.up{color:var(--c2)}em.down{color:var(--bad)}
.said{table-layout:fixed;min-width:760px}
.said pre{margin:0;padding:7px 10px;font-size:12px;border-left:3px solid var(--line)}
.said pre.ok{border-left-color:var(--c2)}
.said td{padding:8px 6px;font-size:13px;overflow-wrap:anywhere}
.said th{color:var(--ink);font-weight:600}
footer{margin-top:34px;color:var(--soft);font-size:13px}
@media(max-width:760px){main{padding:18px 14px 40px}.head,.grid{grid-template-columns:minmax(0,1fr)}
.card{padding:14px}.tiles{gap:10px}.tile{padding:10px 12px}.tile b{font-size:19px}
.big{font-size:38px}
th,td{padding:6px 8px}h1{font-size:22px}}
@media print{button{display:none}body{background:#fff}}
"""

SCRIPT = r"""
'use strict';
const charts = JSON.parse(document.getElementById('charts').textContent);
const esc = s => String(s).replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const short = v => {
  const a = Math.abs(v);
  if (a === 0) return '0';
  if (a < 1e-3) return v.toExponential(1);
  for (const [n, s] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']])
    if (a >= n) return `${+(v / n).toPrecision(3)}${s}`;
  return String(+v.toPrecision(3));
};
const exact = v => v === 0 ? '0' : Math.abs(v) < 1e-3 ? v.toExponential(3) :
  Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString('en') : String(+v.toPrecision(5));

function niceTicks(lo, hi, count) {
  const raw = (hi - lo) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= raw);
  const ticks = [];
  for (let k = Math.ceil(lo / step - 1e-9); k * step <= hi + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}
function logTicks(lo, hi, count, position) {
  for (const digits of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let e = Math.floor(Math.log10(lo)); e <= Math.log10(hi); e++)
      for (const d of digits) {
        const t = +(d * 10 ** e).toPrecision(6);
        if (t >= lo && t <= hi) ticks.push(t);
      }
    if (ticks.length < 3) return niceTicks(lo, hi, count);
    const room = Math.abs(position(hi) - position(lo)) / count / 2;
    const crowded = (t, i) => i > 0 && Math.abs(position(t) - position(ticks[i - 1])) < room;
    if (!ticks.some(crowded)) return ticks;
    if (digits.length === 1) {
      const every = Math.ceil(ticks.length / count);
      return ticks.filter((_, i) => i % every === 0);
    }
  }
}
function scale(lo, hi, from, to, log) {
  const f = log ? Math.log : v => v, a = f(lo), b = f(hi);
  const s = v => from + (f(v) - a) / (b - a) * (to - from);
  s.back = p => { const v = a + (p - from) / (to - from) * (b - a); return log ? Math.exp(v) : v; };
  return s;
}
function range(chart) {
  const usable = v => v !== null && (!chart.ylog || v > 0);
  const drawn = chart.series.filter(s => s.kind !== 'rule');
  const all = drawn.flatMap(s => s.y).filter(usable).sort((a, b) => a - b);
  const rules = chart.series.filter(s => s.kind === 'rule').flatMap(s => s.y).filter(usable);
  if (!all.length) return null;
  const at = q => all[Math.floor(q * (all.length - 1))];
  let lo = Math.min(all[0], ...rules), hi = Math.max(all[all.length - 1], ...rules);
  // A lone spike must not flatten the curve: it is cut off at the top, and said to be.
  const spread = at(.99) - at(.01);
  let cut = 0;
  if (!chart.ylog && all.length > 20 && hi > at(.99) + 3 * spread && spread > 0) {
    hi = at(.99) + .6 * spread;
    cut = all.filter(v => v > hi).length;
  }
  if (lo === hi) { const d = Math.abs(lo) * .1 || 1; lo -= chart.ylog ? lo * .1 : d; hi += d; }
  else if (chart.ylog) { const r = (hi / lo) ** .05; lo /= r; hi *= r; }
  else {
    const d = (hi - lo) * .06;
    lo = lo >= 0 && lo - d < 0 || chart.zero ? 0 : lo - d;
    hi += d;
  }
  return {lo, hi, cut};
}
function draw(figure) {
  const chart = charts[figure.dataset.chart], plot = figure.querySelector('.plot');
  const W = plot.clientWidth, H = chart.height, L = 46, R = 10, T = 8, B = 24;
  const y = range(chart);
  if (!y) { plot.innerHTML = '<p class=soft>no finite values</p>'; return; }
  let xs = chart.series.flatMap(s => s.kind === 'rule' ? [] : s.x);
  if (chart.xlog) xs = xs.filter(x => x > 0);
  let x0 = Math.min(...xs), x1 = Math.max(...xs);
  if (!chart.xlog && x0 < x1 * .6) x0 = 0;
  if (x0 === x1) { x0 -= chart.xlog ? x0 / 2 : 1; x1 += 1; }
  const X = scale(x0, x1, L, W - R, chart.xlog), Y = scale(y.lo, y.hi, H - B, T, chart.ylog);
  const ok = (px, py) => py !== null && (!chart.ylog || py > 0) && (!chart.xlog || px > 0);
  let out = '';
  for (const t of (chart.ylog ? logTicks : niceTicks)(y.lo, y.hi, Math.max(3, H / 45), Y))
    out += `<line x1=${L} x2=${W - R} y1=${Y(t)} y2=${Y(t)} stroke=var(--line) />` +
      `<text x=${L - 8} y=${Y(t) + 4} text-anchor=end>${short(t)}</text>`;
  for (const t of (chart.xlog ? logTicks : niceTicks)(x0, x1, Math.max(3, W / 110), X))
    if (chart.xlog || Number.isInteger(t))
      out += `<text x=${X(t)} y=${H - 6} text-anchor=middle>${short(t)}</text>`;
  const id = `clip-${figure.dataset.chart}`;
  out += `<clipPath id=${id}><rect x=${L - 4} y=${T - 6} width=${W - L - R + 8} ` +
    `height=${H - T - B + 10} /></clipPath><g clip-path=url(#${id})>`;
  for (const s of chart.series) {
    const color = `var(--c${s.color})`;
    if (s.kind === 'rule') {
      out += `<line x1=${L} x2=${W - R} y1=${Y(s.y[0])} y2=${Y(s.y[0])} stroke=${color} ` +
        `stroke-width=1.5 stroke-dasharray="5 4" />`;
      continue;
    }
    let path = '', pen = 'M';
    s.x.forEach((px, i) => {
      if (!ok(px, s.y[i])) { pen = 'M'; return; }
      path += `${pen}${X(px).toFixed(1)} ${Y(s.y[i]).toFixed(1)}`;
      pen = 'L';
    });
    const width = {faint: 1, dots: 1.2, line: 2}[s.kind];
    const opacity = {faint: .4, dots: .6, line: 1}[s.kind];
    out += `<path d="${path}" fill=none stroke=${color} stroke-width=${width} opacity=${opacity} ` +
      `stroke-linejoin=round />`;
    if (s.kind === 'dots' || s.x.length === 1)
      s.x.forEach((px, i) => {
        if (ok(px, s.y[i]))
          out += `<circle cx=${X(px).toFixed(1)} cy=${Y(s.y[i]).toFixed(1)} ` +
            `r=${s.x.length > 60 ? 2 : 3.5} fill=${color} />`;
      });
  }
  out += '</g>';
  for (const b of chart.bad || []) if (!chart.xlog || b > 0)
    out += `<path d="M${X(b)} ${H - B - 9}l5 9h-10z" fill=var(--bad) />`;
  if (y.cut)
    out += `<text x=${W - R} y=${T + 4} text-anchor=end>▲ ${y.cut} beyond the scale</text>`;
  plot.innerHTML = `<svg height=${H} viewBox="0 0 ${W} ${H}" role=img ` +
    `aria-label="${esc(chart.title)}">${out}<g class=cross></g></svg><div class=tip hidden></div>`;
  plot.view = {chart, X, Y, W, H, L, R, T, B, ok};
}
function nearest(xs, x) {
  let a = 0, b = xs.length - 1;
  while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] <= x) a = m; else b = m; }
  return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
}
function hover(plot, event) {
  const v = plot.view;
  if (!v) return;
  const box = plot.getBoundingClientRect(), px = event.clientX - box.left;
  const tip = plot.querySelector('.tip'), cross = plot.querySelector('.cross');
  if (px < v.L - 6 || px > v.W - v.R + 6) { tip.hidden = true; cross.innerHTML = ''; return; }
  const main = v.chart.series.find(s => s.kind !== 'rule');
  const step = main.x[nearest(main.x, v.X.back(px))];
  let marks = `<line x1=${v.X(step)} x2=${v.X(step)} y1=${v.T} y2=${v.H - v.B} ` +
    `stroke=var(--soft) opacity=.5 />`;
  let text = `<b>${esc(v.chart.xname || 'step')} ${step.toLocaleString('en')}</b>`;
  for (const s of v.chart.series) {
    const i = s.kind === 'rule' ? 0 : nearest(s.x, step), value = s.y[i];
    // Evaluations are rare: the nearest one is named with its own step.
    const other = s.kind !== 'rule' && s.x[i] !== step ?
      ` <span class=soft>at ${s.x[i].toLocaleString('en')}</span>` : '';
    text += `<br><i style="background:var(--c${s.color})"></i>${esc(s.label)} <b>` +
      `${value === null ? 'not finite' : exact(value)}</b>${other}`;
    if (s.kind !== 'rule' && v.ok(s.x[i], value))
      marks += `<circle cx=${v.X(s.x[i])} cy=${Math.max(v.T, v.Y(value))} r=4 ` +
        `fill=var(--c${s.color}) stroke=var(--card) stroke-width=1.5 />`;
  }
  cross.innerHTML = marks;
  tip.innerHTML = text;
  tip.hidden = false;
  const right = v.X(step) + 14, left = Math.max(0, v.X(step) - 14 - tip.offsetWidth);
  tip.style.left = `${right + tip.offsetWidth > v.W ? left : right}px`;
}
const figures = document.querySelectorAll('figure[data-chart]');
const drawAll = () => figures.forEach(draw);
figures.forEach(figure => {
  const plot = figure.querySelector('.plot'), chart = charts[figure.dataset.chart];
  plot.addEventListener('pointermove', e => hover(plot, e));
  plot.addEventListener('pointerdown', e => hover(plot, e));
  plot.addEventListener('pointerleave', () => {
    plot.querySelector('.tip')?.setAttribute('hidden', '');
    const cross = plot.querySelector('.cross');
    if (cross) cross.innerHTML = '';
  });
  for (const button of figure.querySelectorAll('button[data-axis]'))
    button.addEventListener('click', () => {
      chart[button.dataset.axis] = !chart[button.dataset.axis];
      button.setAttribute('aria-pressed', chart[button.dataset.axis]);
      draw(figure);
    });
});
let drawnWidth = 0;
new ResizeObserver(entries => {
  const width = entries[0].contentRect.width;
  if (width !== drawnWidth) { drawnWidth = width; drawAll(); }
}).observe(document.querySelector('main'));
document.getElementById('theme').addEventListener('click', () => {
  const root = document.documentElement;
  const theme = root.dataset.theme ||
    (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  root.dataset.theme = theme === 'dark' ? 'light' : 'dark';
});
for (const button of document.querySelectorAll('.copy button'))
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(button.parentNode.querySelector('pre').textContent);
    button.textContent = 'copied';
  });
"""

FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="charts">{charts}</script>
<script>{script}</script>
</body>
</html>
"""


def render_page(title, body, charts):
  """Returns the page.  title: text.  body: HTML.  charts: {id: chart} as `line_chart` refers to."""
  data = json.dumps(charts, separators=(',', ':'), allow_nan=False)
  # '<' could end the script element early; JSON may write any character as an escape.
  data = data.replace('<', '\\u003c').replace('>', '\\u003e').replace('&', '\\u0026')
  return FRAME.format(title=html.escape(title), style=STYLE, body=body, charts=data, script=SCRIPT)


def line_chart(name, chart):
  """Returns the HTML of a chart that the script draws from `charts[name]`.

  chart: title, height in pixels, ylog and xlog (start on a logarithmic axis), xname (what x is, steps if it is not
  said), and series of {label, kind, color, x, y}; kind is line, faint, dots or rule (a level across the chart), y may
  hold null.
  """
  keys = ''.join(
      f'<span class="key"><s class="{s["kind"]}" style="background:var(--c{s["color"]});'
      f'border-color:var(--c{s["color"]})"></s>{html.escape(s["label"])}</span>'
      for s in chart['series']) if len(chart['series']) > 1 else ''
  buttons = ''.join(
      f'<button data-axis="{axis}" aria-pressed="{str(bool(chart.get(axis))).lower()}">'
      f'log {axis[0]}</button>' for axis in chart.get('switches', ()))
  return (f'<figure class="card" data-chart="{html.escape(name)}"><div class="top">'
          f'<h3>{html.escape(chart["title"])}</h3>{keys}{buttons}</div>'
          f'<div class="plot" style="min-height:{chart["height"]}px">'
          '<noscript>The curves need JavaScript; their numbers are in metrics.jsonl.</noscript>'
          '</div></figure>')


def section(title, body):
  """Returns a section of the page, '' where there is nothing in it.  body: HTML."""
  return f'<h2>{html.escape(str(title))}</h2>\n{body}' if body else ''


def table(header, rows, best=()):
  """Returns an HTML table.  rows: of text, escaped here.  best: (row, column) pairs to stress."""
  head = ''.join(f'<th>{html.escape(str(h))}</th>' for h in header)
  body = ''.join(
      '<tr>' + ''.join(
          f'<td{" class=best" if (r, c) in best else ""}>{html.escape(str(cell))}</td>'
          for c, cell in enumerate(row)) + '</tr>' for r, row in enumerate(rows))
  return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def settings(nested):
  """Returns nested dicts as columns of names and values; single values come first."""
  def listed(title, entries):
    rows = ''.join(f'<dt>{html.escape(str(k))}</dt><dd>{html.escape(_plain(v))}</dd>'
                   for k, v in entries)
    return f'<section><h3>{html.escape(str(title))}</h3><dl>{rows}</dl></section>' if rows else ''

  single = [(k, v) for k, v in nested.items() if not isinstance(v, dict)]
  groups = [(k, v) for k, v in nested.items() if isinstance(v, dict)]
  return '<div class="groups">' + listed('run', single) + ''.join(
      listed(k, v.items()) for k, v in groups) + '</div>'


def _plain(value):
  return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
