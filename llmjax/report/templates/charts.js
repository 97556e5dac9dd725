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
