"use strict";
// Polls /stats and draws; keeps ten minutes of history in the page and nothing anywhere else.
const history = [];
const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat();

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit += 1; }
  return `${n >= 100 || unit === 0 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
}

function span(seconds) {
  const d = Math.floor(seconds / 86400), h = Math.floor(seconds / 3600) % 24, m = Math.floor(seconds / 60) % 60;
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.floor(seconds)} s`;
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Columns: [title, value of a row, numeric?]; a value may be a node.
function table(title, columns, rows) {
  if (!rows.length) return [];
  const head = element("tr", {}, ...columns.map(([name, , numeric]) => element("th", numeric ? { class: "n" } : {}, name)));
  const body = rows.map((row) => element("tr", {}, ...columns.map(([, value, numeric]) => element("td", numeric ? { class: "n" } : {}, value(row) ?? "–"))));
  return [element("h2", {}, title), element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)))];
}

function bar(share) {
  const fill = element("i");
  fill.style.width = `${Math.round(share * 100)}%`;
  return element("div", { class: "bar", title: `${(share * 100).toFixed(1)} %` }, fill);
}

function chart(id, series) {
  const svg = $(id), width = 600, height = 120;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const most = Math.max(1, ...series.flatMap((line) => line.points));
  svg.replaceChildren(...series.map((line) => {
    const step = width / Math.max(1, line.points.length - 1);
    const points = line.points.map((value, at) => `${(at * step).toFixed(1)},${(height - 4 - (value / most) * (height - 12)).toFixed(1)}`).join(" ");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    for (const [name, value] of Object.entries({ points, fill: "none", stroke: line.color, "stroke-width": 2, "vector-effect": "non-scaling-stroke" })) path.setAttribute(name, value);
    return path;
  }));
}

function draw(stats) {
  const last = history.at(-1);
  const at = performance.now() / 1000;
  const point = { at, now: stats.connections.now, total: stats.connections.total, in: stats.connections.bytes_in, out: stats.connections.bytes_out };
  const rate = (key) => (last ? Math.max(0, (point[key] - last[key]) / (at - last.at)) : 0);
  point.rates = { in: rate("in"), out: rate("out"), total: rate("total") };
  history.push(point);
  if (history.length > 300) history.shift();
  $("since").textContent = `up ${span(stats.uptime_seconds)}`;
  const backends = stats.pools.flatMap((pool) => pool.backends);
  const up = backends.filter((backend) => ["up", "starting"].includes(backend.state)).length;
  $("tiles").replaceChildren(...[
    [count.format(stats.connections.now), "connections now"],
    [count.format(stats.connections.total), "since the start"],
    [count.format(stats.connections.rejected), "refused"],
    [`${up} / ${backends.length}`, "backends in service"],
    [bytes(stats.connections.bytes_in), "from clients"],
    [bytes(stats.connections.bytes_out), "to clients"],
  ].map(([value, name]) => element("div", { class: "tile" }, element("b", {}, value), element("span", {}, name))));
  $("connections-now").textContent = `${count.format(point.now)} now, ${point.rates.total.toFixed(1)} new/s`;
  $("bytes-now").textContent = `${bytes(point.rates.in)}/s, ${bytes(point.rates.out)}/s`;
  chart("connections", [{ points: history.map((p) => p.now), color: "var(--one)" }]);
  chart("bytes", [{ points: history.map((p) => p.rates.in), color: "var(--one)" }, { points: history.map((p) => p.rates.out), color: "var(--two)" }]);
  $("pools").replaceChildren(...stats.pools.flatMap((pool) => table(`Pool ${pool.name}`, [
    ["Backend", (b) => b.name],
    ["Address", (b) => b.addr],
    ["State", (b) => element("span", { class: b.state, title: b.check ?? "" }, b.state)],
    ["Share", (b) => bar(b.share)],
    ["Now", (b) => count.format(b.now), true],
    ["Total", (b) => count.format(b.total), true],
    ["Weight", (b) => b.weight, true],
    ["In", (b) => bytes(b.bytes_in), true],
    ["Out", (b) => bytes(b.bytes_out), true],
    ["Failed", (b) => count.format(b.connect_failed + b.connect_timeout), true],
    ["Connect p99", (b) => (b.connect_p99_us == null ? null : `≤ ${b.connect_p99_us / 1000} ms`), true],
  ], pool.backends)));
  $("listeners").replaceChildren(...table("Listeners", [
    ["Name", (l) => l.name],
    ["Address", (l) => `${l.listen}/${l.protocol}`],
    ["Pool", (l) => l.pool],
    ["Now", (l) => count.format(l.now), true],
    ["Total", (l) => count.format(l.total), true],
    ["Refused", (l) => count.format(l.rejected_client + l.rejected_limit + l.rejected_proxy), true],
    ["No backend", (l) => count.format(l.no_backend), true],
    ["In", (l) => bytes(l.bytes_in), true],
    ["Out", (l) => bytes(l.bytes_out), true],
  ], stats.listeners));
  $("countries").replaceChildren(...table("Clients by country", [
    ["Country", (c) => c.code],
    ["Now", (c) => count.format(c.now), true],
    ["Total", (c) => count.format(c.total), true],
    ["", (c) => bar(stats.connections.now ? c.now / stats.connections.now : 0)],
  ], stats.countries.slice(0, 30)));
  const conduits = stats.conduits;
  $("conduits").replaceChildren(...(conduits ? [
    ...table("Conduit instances", [
      ["Name", (c) => c.name],
      ["Connected", (c) => (c.figures ? count.format(c.figures.connected) : null), true],
      ["Connecting", (c) => (c.figures ? count.format(c.figures.connecting) : null), true],
      ["Share", (c) => bar(c.share)],
      ["Up", (c) => (c.figures ? bytes(c.figures.bytes_up) : null), true],
      ["Down", (c) => (c.figures ? bytes(c.figures.bytes_down) : null), true],
      ["Note", (c) => c.note ?? ""],
    ], conduits.instances),
    element("p", {}, `${count.format(conduits.connected)} connected and ${count.format(conduits.connecting)} connecting over ${conduits.read} instances; ${bytes(conduits.bytes_up)} up, ${bytes(conduits.bytes_down)} down.`),
    ...conduits.advice.map((line) => element("p", {}, `${line}.`)),
    ...table("Conduit clients by region", [
      ["Region", ([code]) => code],
      ["Connected", ([, region]) => count.format(region.connected), true],
      ["Connecting", ([, region]) => count.format(region.connecting), true],
      ["Up", ([, region]) => bytes(region.bytes_up), true],
      ["Down", ([, region]) => bytes(region.bytes_down), true],
    ], Object.entries(conduits.regions).sort((a, b) => b[1].connected - a[1].connected).slice(0, 30)),
  ] : []));
}

async function poll() {
  try {
    const token = sessionStorage.getItem("token");
    const response = await fetch("stats", { headers: token ? { Authorization: `Bearer ${token}` } : {}, signal: AbortSignal.timeout(5000) });
    $("login").hidden = response.status !== 401;
    $("main").hidden = !response.ok;
    if (response.ok) draw(await response.json());
    $("error").textContent = response.ok || response.status === 401 ? "" : `the service answers ${response.status}`;
  } catch {
    $("error").textContent = "the service does not answer";
  }
  setTimeout(poll, 2000);
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
});
poll();
