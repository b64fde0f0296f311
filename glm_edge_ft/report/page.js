"use strict";
// Draws the page from the JSON block. Text of the runs only ever becomes text nodes and attribute values.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const PAGE_ROWS = 25;
const COLORS = 8;
const LABELS = {
  summary: ["Summary", "概览"], curves: ["Curves", "曲线"], evaluations: ["Evaluations", "评测"], config: ["Config", "配置"],
  data: ["Data", "数据"], predictions: ["Predictions", "预测"],
  model: ["model", "模型"], parameters: ["parameters", "参数量"], trained: ["{0} of {1} trained ({2} %)", "训练 {0} / 共 {1}（{2} %）"],
  precision: ["precision", "精度"], memory: ["memory (estimate, without activations)", "内存/显存（估算，不含激活）"],
  peak: ["peak memory (measured)", "内存/显存峰值（实测）"], steps: ["last step", "最后一步"], time: ["training time", "训练用时"],
  speed: ["throughput", "吞吐"], speed_value: ["{0} tokens/s (median of the log)", "{0} tokens/s（日志中位数）"], folder: ["folder", "目录"],
  overrides: ["--set", "--set"], resumed_from: ["resumed from", "续训自"], adapter: ["fine-tuning", "微调方式"], full: ["full", "全参数"],
  loss: ["loss", "损失"], learning_rate: ["learning rate", "学习率"], grad_norm: ["gradient norm", "梯度范数"],
  tokens_per_second: ["throughput, tokens/s", "吞吐，tokens/s"], peak_memory_bytes: ["peak memory, GB", "内存/显存峰值，GB"],
  train: ["train", "训练"], eval: ["dev", "验证"], test: ["test", "测试"], val: ["dev", "验证"], step: ["step", "步"], run: ["run", "运行"], set: ["data", "数据"],
  on_dev: ["{0}, dev", "{0}，验证集"],
  differs: ["What differs between the runs", "各次运行的差异"], same: ["The resolved configs are the same.", "最终生效的配置完全相同。"],
  whole: ["Whole config", "完整配置"], versions: ["Versions", "版本"],
  rows: ["rows", "行数"], tokens: ["tokens", "token 数"], supervised: ["supervised", "计入损失"], lengths: ["row length, tokens", "每行长度（token）"],
  dropped: ["dropped rows", "丢弃的行"], cut: ["shortened rows", "被截断的行"], by_role: ["tokens by role", "按角色的 token"],
  control: ["rows with control tokens in the text", "文本中含控制符的行"], fingerprint: ["fingerprint", "数据指纹"], file: ["file", "文件"],
  prompt: ["prompt", "提示"], reference: ["reference", "参考答案"], prediction: ["prediction", "模型回复"],
  search: ["Search prompt, reference, prediction, file:line", "搜索提示、参考答案、回复、文件:行号"], all_files: ["all files", "全部文件"],
  all_runs: ["all runs", "全部运行"],
  worst: ["worst first", "最差在前"], best: ["best first", "最好在前"], order: ["order of the data", "数据顺序"],
  previous: ["previous", "上一页"], next: ["next", "下一页"], found: ["{0} of {1} · page {2} of {3}", "{0} / {1} 条 · 第 {2} / {3} 页"],
  nothing: ["Nothing matches.", "没有匹配的条目。"], missing: ["in the reference only", "仅参考答案有"], extra: ["in the prediction only", "仅回复有"],
  no_diff: ["too long to compare", "太长，未作比较"],
  auto: ["theme: system", "主题：跟随系统"], light: ["light", "浅色"], dark: ["dark", "深色"],
  unfinished: ["Training has not reached its end: last logged step {0}.", "训练尚未结束：日志中最后一步 {0}。"],
  no_record: ["No run.json: config and data report are not shown.", "没有 run.json：无法显示配置和数据报告。"],
  bad_record: ["run.json cannot be read: config and data report are not shown.", "run.json 无法读取：无法显示配置和数据报告。"],
  no_metrics: ["No metrics.jsonl, or nothing in it yet: no curves.", "没有 metrics.jsonl 或其中尚无内容：没有曲线。"],
  no_predictions: ["No predictions yet.", "尚无预测。"],
  broken_lines: ["{0}: {1} unreadable lines left out.", "{0}：略过 {1} 行无法读取的内容。"],
  rows_capped: ["{0}: {1} of {2} rows are shown, the {3} worst and the {3} best by rouge-l.", "{0}：显示 {2} 条中的 {1} 条，即 rouge-l 最差和最好的各 {3} 条。"],
  images_missing: ["{0} images cannot be read any more, the first: {1}", "{0} 张图片已无法读取，第一张：{1}"],
  evaluations_capped: ["The table has the last {0} of {1} evaluations.", "表格只含 {1} 次评测中的最后 {0} 次。"],
  images_capped: ["The page holds the first {0} images.", "页面只含前 {0} 张图片。"],
};
let language = DATA.language === "both" ? (/^zh/i.test(navigator.language || "") ? "zh" : "en") : DATA.language;
const view = { search: "", run: "", file: null, metric: "rouge-l", order: "worst", page: 0 };

const label = (key, ...values) => {
  const pair = Object.hasOwn(LABELS, key) ? LABELS[key] : [key, key];
  return pair[language === "zh" ? 1 : 0].replace(/\{(\d)\}/g, (_, number) => values[number]);
};
function element(name, properties, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const record = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : {});
const count = (value) => (isNumber(value) ? value.toLocaleString("en-US") : "–");
const color = (index) => `var(--c${index % COLORS})`;
function short(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}
const bytes = (value) => (value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : `${(value / 1e6).toFixed(1)} MB`);
function duration(seconds) {
  const whole = Math.round(seconds), pad = (part) => String(part).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
}
const section = (key) => element("h2", {}, label(key));
const title = (run) => (RUNS.length > 1 ? element("h3", {}, run.name) : null);

// ---- summary ----

function summary(run, index) {
  const facts = record(run.record.facts), rows = element("div", { className: "facts" });
  const add = (key, value) => value !== undefined && value !== null && value !== "" && rows.append(element("span", {}, label(key)), element("span", {}, String(value)));
  add("model", run.record.model);
  if (run.record.config) add("adapter", record(run.record.config.peft_config).peft_type || label("full"));
  if (isNumber(facts.parameters) && facts.parameters > 0) {
    const share = ((100 * facts.trainable_parameters) / facts.parameters).toFixed(2);
    add("parameters", label("trained", count(facts.trainable_parameters), count(facts.parameters), share));
  }
  add("precision", facts.precision);
  const logged = [...(run.curves.loss || []), ...(run.curves.eval_loss || [])].map(([step]) => step);
  if (logged.length) add("steps", Math.max(...logged));
  if (isNumber(record(run.ended).train_runtime)) add("time", duration(run.ended.train_runtime));
  const speeds = (run.curves.tokens_per_second || []).map(([, value]) => value).sort((a, b) => a - b);
  if (speeds.length) add("speed", label("speed_value", count(Math.round(speeds[speeds.length >> 1]))));
  const memory = record(facts.memory_bytes);
  if (isNumber(memory.total)) add("memory", bytes(memory.total));
  const peaks = (run.curves.peak_memory_bytes || []).map(([, value]) => value);
  if (peaks.length) add("peak", bytes(Math.max(...peaks)));
  add("resumed_from", run.record.resumed_from);
  add("overrides", (run.record.overrides || []).join("\n"));
  add("folder", run.folder);
  const head = RUNS.length > 1 ? element("h3", {}, swatch(index, false), run.name) : null;
  return element("div", { className: "card" }, head, rows, ...run.notes.map(([key, ...values]) => element("div", { className: "note" }, label(key, ...values))));
}

// ---- curves ----

function swatch(index, dashed) {
  const made = element("span", { className: dashed ? "swatch dashed" : "swatch" });
  made.style.color = color(index);
  return made;
}
function chartSeries(keys) {
  const found = [];
  RUNS.forEach((run, index) => keys.forEach((key, place) => {
    const scale = key === "peak_memory_bytes" ? 1e-9 : 1;
    const points = (run.curves[key] || []).map(([step, value]) => [step, value * scale]);
    const side = keys.length > 1 ? label(place ? "eval" : "train") : "";
    const name = [RUNS.length > 1 ? run.name : "", side].filter(Boolean).join(", ");
    if (points.length) found.push({ name, points, color: RUNS.length > 1 ? index : place, dashed: place > 0 });
  }));
  return found;
}
function ticks(low, high, wanted, whole) {
  const span = high - low || Math.abs(high) || 1, rough = span / wanted, power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  if (whole) step = Math.max(1, step);
  const found = [];
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number++) found.push(number * step || 0);  // ceil gives -0
  return found;
}
function chart(heading, keys) {
  const series = chartSeries(keys);
  if (!series.length) return null;
  const card = element("div", { className: "card chart" }, element("h3", {}, heading));
  if (series.length > 1 && keys.length > 1) {
    card.append(element("div", { className: "legend muted" }, ...series.map((line) => element("span", {}, swatch(line.color, line.dashed), line.name))));
  }
  const holder = element("div", {});
  card.append(holder);
  card.redraw = () => drawChart(holder, series, heading);
  return card;
}
function drawChart(holder, series, heading) {
  const width = Math.max(240, holder.clientWidth), height = 210, left = 52, right = 10, top = 8, bottom = 24;
  const all = series.flatMap((line) => line.points), steps = all.map(([step]) => step), values = all.map(([, value]) => value);
  const fold = (list, choose) => list.reduce((kept, value) => choose(kept, value));
  let x0 = fold(steps, Math.min), x1 = fold(steps, Math.max), y0 = fold(values, Math.min), y1 = fold(values, Math.max);
  if (y0 >= 0 && y0 < 0.5 * y1) y0 = 0;
  if (y1 === y0) { y1 += Math.abs(y1) * 0.1 || 1; if (y0 > 0) y0 = 0; }
  else { y1 += (y1 - y0) * 0.05; }
  if (x1 === x0) { x0 -= 1; x1 += 1; }
  const x = (step) => left + ((step - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => top + (1 - (value - y0) / (y1 - y0)) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": heading });
  for (const value of ticks(y0, y1, 5, false)) {
    svg.append(shape("line", { class: "gridline", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const step of ticks(x0, x1, Math.max(3, Math.floor(width / 90)), true)) {
    svg.append(shape("text", { x: x(step), y: height - 6, "text-anchor": step === x1 ? "end" : "middle" }, count(step)));
  }
  for (const line of series) {
    const path = line.points.map(([step, value], at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(shape("path", { d: path, fill: "none", style: `stroke:${color(line.color)}`, "stroke-width": 2, "stroke-dasharray": line.dashed ? "6 4" : "none" }));
    if (line.points.length <= 30) for (const [step, value] of line.points) svg.append(shape("circle", { cx: x(step), cy: y(value), r: 2.5, style: `fill:${color(line.color)}` }));
  }
  const cursor = shape("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  const known = [...new Set(steps)].sort((a, b) => a - b), tip = document.getElementById("tip");
  svg.addEventListener("pointermove", (event) => {
    const at = x0 + (((event.clientX - svg.getBoundingClientRect().left) - left) / (width - left - right)) * (x1 - x0);
    const step = known.reduce((kept, other) => (Math.abs(other - at) < Math.abs(kept - at) ? other : kept));
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); cursor.setAttribute("visibility", "visible");
    const shown = series.map((line) => [line, line.points.find((point) => point[0] === step)]).filter(([, point]) => point);
    tip.replaceChildren(element("div", { className: "muted" }, `${label("step")} ${count(step)}`),
      ...shown.map(([line, point]) => element("div", {}, swatch(line.color, line.dashed), line.name ? `${line.name}: ` : "", short(point[1]))));
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 10)}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
  holder.replaceChildren(svg);
}
function charts() {
  const made = [chart(label("loss"), ["loss", "eval_loss"])];
  for (const key of ["learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"]) made.push(chart(label(key), [key]));
  for (const metric of DATA.metrics) made.push(chart(label("on_dev", metric), [`eval_${metric}`]));
  const found = made.filter(Boolean);
  if (!found.length) return [];
  const legend = RUNS.length > 1 ? element("div", { className: "legend" }, ...RUNS.map((run, index) => element("span", {}, swatch(index, false), run.name))) : null;
  return [section("curves"), legend, element("div", { className: "grid" }, ...found)];
}

// ---- evaluations ----

function evaluationRows(run) {
  const dev = run.evaluations.filter((one) => one.set === "eval"), rest = run.evaluations.filter((one) => one.set !== "eval");
  return [...(dev.length > 8 ? [dev[0], ...dev.slice(-7)] : dev), ...rest];
}
function evaluations() {
  const names = ["loss", ...DATA.metrics], rows = [];
  for (const run of RUNS) for (const one of evaluationRows(run)) {
    const cells = names.map((name) => element("td", { className: "number" }, isNumber(one[name]) ? one[name].toFixed(name === "loss" ? 4 : 2) : "–"));
    const name = [RUNS.length > 1 ? run.name : "", one.model || ""].filter(Boolean).join(": ");
    rows.push(element("tr", {}, element("td", {}, name), element("td", {}, label(one.set)), element("td", { className: "number" }, count(one.step)), ...cells));
  }
  if (!rows.length) return [];
  const heads = [element("th", {}, RUNS.length > 1 ? label("run") : ""), element("th", {}, label("set")), element("th", { className: "number" }, label("step"))];
  const head = element("tr", {}, ...heads, ...names.map((name) => element("th", { className: "number" }, label(name))));
  return [section("evaluations"), element("div", { className: "card scroll" }, element("table", { id: "evaluations" }, element("thead", {}, head), element("tbody", {}, ...rows)))];
}

// ---- config ----

function flatten(value, prefix, into) {
  if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
    for (const [key, part] of Object.entries(value)) flatten(part, prefix ? `${prefix}.${key}` : key, into);
  } else if (prefix) into.set(prefix, Array.isArray(value) && value.every((part) => typeof part !== "object") ? value.join(", ") : value === null ? "null" : typeof value === "object" ? JSON.stringify(value) : String(value));
  return into;
}
function settings(run) {
  const found = new Map([["model", String(run.record.model ?? "–")]]);
  flatten(record(run.record.config), "", found);
  for (const [split, facts] of Object.entries(record(run.record.data))) found.set(`${label(split)}: ${label("fingerprint")}`, String(record(facts).fingerprint ?? "–"));
  flatten(record(run.record.versions), "versions", found);
  return found;
}
const keyTable = (pairs) => element("table", { className: "keys" }, element("tbody", {}, ...pairs.map(([key, ...values]) => element("tr", {}, element("td", {}, key), ...values.map((value) => element("td", {}, value))))));
function configs() {
  const known = RUNS.filter((run) => run.record.config);
  if (!known.length) return [];
  const parts = [section("config")];
  if (known.length > 1) {
    const all = known.map(settings), keys = [...new Set(all.flatMap((one) => [...one.keys()]))];
    const differing = keys.map((key) => [key, ...all.map((one) => one.get(key) ?? "–")]).filter(([, ...values]) => new Set(values).size > 1);
    const table = keyTable(differing);
    table.id = "differences";
    table.prepend(element("thead", {}, element("tr", {}, element("th", {}), ...known.map((run) => element("th", {}, run.name)))));
    parts.push(element("div", { className: "card scroll" }, element("h3", {}, label("differs")), differing.length ? table : element("p", { className: "muted" }, label("same"))));
  }
  for (const run of known) {
    const groups = new Map();
    for (const [key, value] of flatten(record(run.record.config), "", new Map())) {
      const [first, ...rest] = key.split("."), group = rest.length ? first : "";
      groups.set(group, [...(groups.get(group) || []), [rest.length ? rest.join(".") : key, value]]);
    }
    const body = [...groups].map(([group, pairs]) => element("div", { className: "card" }, group ? element("h3", {}, group) : null, keyTable(pairs)));
    const versions = [...flatten(record(run.record.versions), "", new Map())];
    if (versions.length) body.push(element("div", { className: "card" }, element("h3", {}, label("versions")), keyTable(versions)));
    const heading = RUNS.length > 1 ? `${label("whole")}: ${run.name}` : label("whole");
    parts.push(element("details", { open: RUNS.length === 1 }, element("summary", {}, heading), element("div", { className: "grid" }, ...body)));
  }
  return parts;
}

// ---- data ----

function dataCard(split, facts) {
  const report = record(record(facts).report), rows = [], add = (key, value) => rows.push([label(key), value]);
  add("file", String(record(facts).file ?? "–"));
  add("rows", count(report.rows));
  add("tokens", count(report.tokens));
  if (report.tokens > 0) add("supervised", `${count(report.supervised_tokens)} (${((100 * report.supervised_tokens) / report.tokens).toFixed(1)} %)`);
  add("lengths", Object.entries(record(report.lengths)).map(([name, value]) => `${name} ${count(value)}`).join(" · "));
  add("dropped", count(report.dropped_rows));
  const cut = Object.entries(record(report.cut_rows)).filter(([, value]) => value > 0);
  add("cut", cut.length ? cut.map(([name, value]) => `${name} ${count(value)}`).join(" · ") : "0");
  if (report.control_text_rows) add("control", count(report.control_text_rows));
  const roles = Object.entries(record(report.role_tokens)).filter(([, value]) => value > 0), sum = roles.reduce((total, [, value]) => total + value, 0);
  const bar = element("div", { className: "bar" }, ...roles.map(([, value], index) => {
    const part = element("span", {});
    part.style.width = `${(100 * value) / sum}%`;
    part.style.background = color(index);
    return part;
  }));
  const legend = element("div", { className: "legend" }, ...roles.map(([name, value], index) => element("span", {}, swatch(index, false), `${name} ${((100 * value) / sum).toFixed(1)} %`)));
  const remarks = [...(report.dropped || []), ...(report.notices || [])].map((text) => element("div", { className: "note" }, String(text)));
  return element("div", { className: "card" }, element("h3", {}, label(split)), keyTable(rows), element("div", { className: "muted" }, label("by_role")), bar, legend, ...remarks);
}
function dataReports() {
  const parts = [];
  for (const run of RUNS) {
    const splits = Object.entries(record(run.record.data));
    if (splits.length) parts.push(element("div", {}, title(run), element("div", { className: "grid" }, ...splits.map(([split, facts]) => dataCard(split, facts)))));
  }
  return parts.length ? [section("data"), ...parts] : [];
}

// ---- predictions ----

const LOWER = [];  // of DATA.texts, for the search; made when it is first used
const lower = (number) => (LOWER[number] ??= DATA.texts[number].toLowerCase());
const ROWS = RUNS.flatMap((run, runIndex) => run.files.flatMap((file) => file.rows.map((row) => {
  const [place, prompt, reference, prediction] = row.slice(0, 4).map((number) => DATA.texts[number]);
  return { run: runIndex, file: file.name, place, prompt, reference, prediction, scores: row[4], images: row[5], texts: row.slice(0, 4) };
})));
const words = (text) => text.match(/[\p{L}\p{N}_](?:(?![\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff])[\p{L}\p{N}_'])*|\s+|[^]/gu) || [];
function difference(first, second) {
  // The longest common subsequence of words, of characters where the script has no spaces; null where that is too slow.
  if (first.length * second.length > 1e6) return null;
  const wide = second.length + 1, table = new Uint16Array((first.length + 1) * wide);
  for (let i = first.length - 1; i >= 0; i--) for (let j = second.length - 1; j >= 0; j--) {
    table[i * wide + j] = first[i] === second[j] ? table[(i + 1) * wide + j + 1] + 1 : Math.max(table[(i + 1) * wide + j], table[i * wide + j + 1]);
  }
  const shared = [new Set(), new Set()];
  for (let i = 0, j = 0; i < first.length && j < second.length;) {
    if (first[i] === second[j]) { shared[0].add(i++); shared[1].add(j++); }
    else if (table[(i + 1) * wide + j] >= table[i * wide + j + 1]) i++;
    else j++;
  }
  return shared;
}
function marked(parts, shared, kind) {
  const box = element("div", { className: "text" });
  for (let start = 0, end; start < parts.length; start = end) {
    const same = shared.has(start);
    for (end = start + 1; end < parts.length && shared.has(end) === same; end++);
    const text = parts.slice(start, end).join("");
    box.append(same ? text : element("mark", { className: kind }, text));
  }
  return box;
}
function promptBox(text) {
  return element("div", { className: "text" }, ...text.split(/(<\|[^|<>]{1,40}\|>)/).map((part, at) => (at % 2 ? element("span", { className: "control" }, part) : part)));
}
function pair(row) {
  const first = words(row.reference), second = words(row.prediction), shared = difference(first, second);
  const box = (key, body) => element("div", {}, element("div", { className: "label" }, label(key)), body);
  const plain = (text) => element("div", { className: "text" }, text);
  const scores = row.scores.map((score, at) => (score === null ? null : element("span", {}, `${DATA.metrics[at]} `, element("b", {}, score.toFixed(1)))));
  const where = [RUNS.length > 1 ? RUNS[row.run].name : "", row.file, row.place].filter(Boolean).join(" · ");
  const head = element("div", { className: "head" }, element("span", { className: "where" }, where), ...scores, shared ? null : element("span", {}, label("no_diff")));
  const images = row.images.filter((number) => number !== null).map((number) => element("img", { src: DATA.images[number], alt: "", loading: "lazy" }));
  return element("article", { className: "card pair" }, head, box("prompt", element("div", {}, ...images, promptBox(row.prompt))),
    box("reference", shared ? marked(first, shared[0], "missing") : plain(row.reference)), box("prediction", shared ? marked(second, shared[1], "extra") : plain(row.prediction)));
}
function selected() {
  const wanted = view.search.trim().toLowerCase(), at = DATA.metrics.indexOf(view.metric);
  const rows = ROWS.filter((row) => (!view.file || row.file === view.file) && (view.run === "" || row.run === Number(view.run)) && (!wanted || row.texts.some((number) => lower(number).includes(wanted))));
  if (view.order === "order") return rows;
  const sign = view.order === "best" ? -1 : 1, missing = sign * Infinity;  // rows without a score come last
  const score = (row) => row.scores[at] ?? missing;
  return rows.sort((a, b) => (score(a) === score(b) ? 0 : sign * (score(a) - score(b))));
}
function showRows() {
  const rows = selected(), pages = Math.max(1, Math.ceil(rows.length / PAGE_ROWS));
  view.page = Math.max(0, Math.min(view.page, pages - 1));
  const turn = (by) => () => { view.page += by; showRows(); document.getElementById("predictions").scrollIntoView(); };
  const back = () => element("button", { disabled: view.page === 0, onclick: turn(-1) }, label("previous"));
  const on = () => element("button", { disabled: view.page >= pages - 1, onclick: turn(1) }, label("next"));
  const line = () => element("span", { className: "muted found" }, label("found", count(rows.length), count(ROWS.length), view.page + 1, pages));
  const body = rows.slice(view.page * PAGE_ROWS, (view.page + 1) * PAGE_ROWS).map(pair);
  document.getElementById("rows").replaceChildren(element("div", { className: "tools" }, line(), back(), on()),
    ...(body.length ? body : [element("p", {}, label("nothing"))]), pages > 1 ? element("div", { className: "tools" }, line(), back(), on()) : "");
}
function choice(id, options, value, change) {
  const made = element("select", { id, ariaLabel: id, onchange: () => change(made.value) }, ...options.map(([key, text]) => element("option", { value: key }, text)));
  made.value = value;
  return made;
}
function predictions() {
  if (!ROWS.length) return [];
  const files = [...new Set(ROWS.map((row) => row.file))];
  if (view.file === null) view.file = files[files.length - 1];
  const set = (name) => (value) => { view[name] = value; view.page = 0; showRows(); };
  const search = element("input", { id: "search", type: "search", value: view.search, placeholder: label("search"), ariaLabel: label("search") });
  search.oninput = () => set("search")(search.value);
  const tools = element("div", { className: "tools" }, search,
    RUNS.length > 1 ? choice("run", [["", label("all_runs")], ...RUNS.map((run, index) => [String(index), run.name])], view.run, set("run")) : null,
    choice("file", [["", label("all_files")], ...files.map((name) => [name, name])], view.file, set("file")),
    choice("metric", DATA.metrics.map((name) => [name, name]), view.metric, set("metric")),
    choice("order", ["worst", "best", "order"].map((key) => [key, label(key)]), view.order, set("order")));
  const legend = element("div", { className: "legend" }, element("mark", { className: "missing" }, label("missing")), element("mark", { className: "extra" }, label("extra")));
  const heading = section("predictions");
  heading.id = "predictions";
  return [heading, tools, legend, element("div", { id: "rows" })];
}

// ---- the page ----

function redraw() {
  for (const card of document.querySelectorAll(".chart")) card.redraw();
}
function render() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  const parts = [section("summary"), element("div", { className: RUNS.length > 1 ? "grid" : "" }, ...RUNS.map(summary)), ...charts(), ...evaluations(), ...predictions(), ...configs(), ...dataReports()];
  document.getElementById("main").replaceChildren(...parts.filter(Boolean));
  for (const option of document.getElementById("theme").options) option.textContent = label(option.value);
  redraw();
  if (ROWS.length) showRows();
}
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const themeSwitch = document.getElementById("theme"), languageSwitch = document.getElementById("language");
function paint() {
  document.documentElement.dataset.theme = themeSwitch.value === "auto" ? (systemDark.matches ? "dark" : "light") : themeSwitch.value;
}
for (const key of ["auto", "light", "dark"]) themeSwitch.append(element("option", { value: key }, key));
for (const [key, text] of [["en", "English"], ["zh", "中文"]]) languageSwitch.append(element("option", { value: key }, text));
languageSwitch.value = language;
languageSwitch.hidden = DATA.language !== "both";
languageSwitch.onchange = () => { language = languageSwitch.value; render(); };
themeSwitch.onchange = paint;
systemDark.addEventListener("change", paint);
addEventListener("resize", redraw);
paint();
render();
