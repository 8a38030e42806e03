"use strict";
// Everything that the store says reaches the page as text: `h` makes elements, and sets text and attributes only.
(() => {
  const doc = JSON.parse(document.getElementById("document").textContent);
  const page = document.getElementById("page");
  const state = { cost: "macs", picked: -1, sort: "macs", down: false, filter: "", frontOnly: false };
  const rows = doc.rows;

  function h(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value === true) element.setAttribute(key, "");
      else if (value !== false && value != null) element.setAttribute(key, value);
    }
    for (const child of children.flat(Infinity)) if (child != null) element.append(child);
    return element;
  }
  const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
  const whole = (value) => (value == null ? "" : value.toLocaleString("en"));
  const percent = (value) => (value == null ? "" : value.toFixed(2));
  const share = (value) => (value == null ? "" : `${(100 * value).toFixed(1)} %`);
  function scaled(value) {
    for (const [prefix, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (value >= size) return `${(value / size).toPrecision(3)} ${prefix}`;
    }
    return String(value);
  }
  const side = (shape) => (shape.length === 3 ? shape[1] : 1);
  const shapeText = (shape) => shape.join(" \u00d7 ");
  const networkOf = (name) => doc.networks.find((network) => network.name === name);
  const several = doc.series.length > 1;

  // Charts -------------------------------------------------------------------------------------------------------------

  const tip = h("div", { id: "tip", role: "status", hidden: true });
  function showTip(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 14) : y + 18}px`;
  }
  const hideTip = () => { tip.hidden = true; };
  const tooltip = (_, event, __, value) => {
    if (value == null || value === "") hideTip();
    else showTip(String(value), event.clientX, event.clientY);
  };

  const charts = new Map();
  async function draw(place, spec, datasets, label, onPick) {
    const began = (charts.get(place)?.number ?? 0) + 1;
    charts.get(place)?.view?.finalize();
    charts.set(place, { number: began });
    const labels = Object.values(datasets).flat().map((row) => String(row.series ?? row.instance).length);
    const columns = Math.max(1, Math.floor(place.clientWidth / (36 + 7.2 * Math.max(1, ...labels))));
    const config = { ...spec.config, legend: { ...spec.config.legend, columns } };
    const result = await vegaEmbed(place, { ...spec, width: "container", config, datasets }, {
      mode: "vega-lite", ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip,
    });
    place.setAttribute("role", "figure");  // Vega names the element after its own words
    place.setAttribute("aria-label", label);
    place.removeAttribute("aria-roledescription");
    if (onPick) result.view.addEventListener("click", (_, item) => { if (item && item.datum) onPick(item.datum); });
    charts.set(place, { number: began, view: result.view });
    return result.view;
  }

  // What a row says
  function rowText(row) {
    const lines = [row.instance, `${scaled(row.macs)} MACs${row.cascade ? " on average" : ""} (${share(row.relative)} of full)`];
    if (row.params != null) lines.push(`${scaled(row.params)} parameters`);
    if (row.latency != null) lines.push(`${row.latency.toPrecision(3)} ms`);
    lines.push(`top-1 ${percent(row.top1)} %${row.split === "test" ? "" : ", held-out images"}`);
    if (several) lines.push(row.series);
    return lines.join("\n");
  }
  for (const row of rows) row.text = rowText(row);

  // Cost and accuracy ----------------------------------------------------------------------------------------------------

  const frontPlace = h("div", { class: "chart", tabindex: 0, id: "front" });
  let frontView = null;
  async function drawFront() {
    const shown = rows.filter((row) => row[state.cost] != null);
    frontView = await draw(
      frontPlace, doc.charts.front[state.cost], { rows: shown },
      `Chart of ${doc.axes[state.cost]} against top-1 accuracy: ${many(shown.length, "row")}, which the table lists. ` +
      "Arrow keys go from row to row, Enter shows the row in the table.",
      (datum) => { if (datum.row != null) pick(datum.row, true); },
    );
    ring();
  }
  function ring() {
    if (frontView) frontView.signal("picked", state.picked).runAsync();
  }
  frontPlace.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -rows.length, End: rows.length }[event.key];
    if (step) {
      const order = rows.filter((row) => row[state.cost] != null)
        .sort((a, b) => a[state.cost] - b[state.cost] || a.top1 - b.top1 || a.row - b.row);
      const at = order.findIndex((row) => row.row === state.picked);
      const next = order[Math.max(0, Math.min(order.length - 1, at + step))];
      pick(next.row, false);
      const box = frontPlace.getBoundingClientRect();
      showTip(next.text, box.left + 60, box.top + 10);
    } else if (event.key === "Enter" && state.picked >= 0) pick(state.picked, true);
    else if (event.key === "Escape") hideTip();
    else return;
    event.preventDefault();
  });
  frontPlace.addEventListener("blur", hideTip);

  function frontSection() {
    const axes = Object.keys(doc.axes).filter((cost) => rows.some((row) => row[cost] != null));
    const choice = h("select", { id: "axis", onchange: (event) => { state.cost = event.target.value; drawFront(); } },
      axes.map((cost) => h("option", { value: cost }, doc.axes[cost])));
    return section("cost", "Cost and accuracy",
      "Each mark is an instance of a network: the same weights, run at a different cost. The line joins the instances that no "
      + "other instance of their table beats in both MACs and accuracy.",
      h("div", { class: "tools" }, h("label", {}, "Horizontal axis", choice)), frontPlace);
  }

  // The table ------------------------------------------------------------------------------------------------------------

  const COLUMNS = [
    ["series", "table", (row) => row.series, "text", several],
    ["instance", "instance", (row) => row.instance, "text", true],
    ["macs", "MACs", (row) => whole(row.macs), "", true],
    ["relative", "of full", (row) => share(row.relative), "", true],
    ["params", "parameters", (row) => whole(row.params), "", rows.some((row) => row.params != null)],
    ["latency", "ms", (row) => (row.latency == null ? "" : row.latency.toPrecision(3)), "", rows.some((row) => row.latency != null)],
    ["top1", "top-1 %", (row) => percent(row.top1), "", true],
    ["top5", "top-5 %", (row) => percent(row.top5), "", rows.some((row) => row.top5 != null)],
    ["loss", "loss", (row) => row.loss.toFixed(4), "", true],
  ].filter((column) => column[4]);
  const body = h("tbody", {});
  const said = h("p", { class: "note", role: "status" });
  const heads = new Map();

  function shownRows() {
    const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row) => (!state.frontOnly || row.front)
      && words.every((word) => `${row.series} ${row.instance}`.toLowerCase().includes(word));
    const sign = state.down ? -1 : 1, key = state.sort;
    return rows.filter(fits).sort((a, b) => {
      const [x, y] = [a[key], b[key]];
      if (x == null || y == null) return (x == null) - (y == null) || a.row - b.row;
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y) || a.row - b.row;
    });
  }
  const rowElements = rows.map((row) => h("tr", { class: "pick", id: `row-${row.row}`, onclick: () => pick(row.row, false) },
    COLUMNS.map(([key, , text, kind]) => {
      if (key === "instance") {
        return h("th", { scope: "row" }, h("span", { class: "star", title: row.front ? "Pareto-optimal" : null }, row.front ? "* " : ""),
          h("button", { type: "button" }, row.instance));
      }
      const cell = h("td", { class: kind || null }, text(row));
      if (key === "series") cell.prepend(colourKey(row.series));
      return cell;
    })));
  function colourKey(series) {
    const key = h("span", { class: "key" }), colours = doc.colours;
    key.style.background = colours[doc.series.indexOf(series) % colours.length];
    return key;
  }
  function fillTable() {
    const shown = shownRows();
    body.replaceChildren(...shown.map((row) => rowElements[row.row]));
    for (const [key, head] of heads) {
      head.setAttribute("aria-sort", key !== state.sort ? "none" : state.down ? "descending" : "ascending");
    }
    said.textContent = shown.length === rows.length
      ? `${many(rows.length, "row")}; * marks the rows that no row of the same table beats in both MACs and top-1.`
      : `${shown.length} of ${many(rows.length, "row")}.`;
  }
  function csv() {
    const quoted = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    const lines = shownRows().map((row) => COLUMNS.map(([key]) => quoted(row[key] == null ? "" : String(row[key]))).join(","));
    return [COLUMNS.map(([key]) => key).join(","), ...lines, ""].join("\n");
  }
  async function copy() {
    const text = csv();
    try {
      await navigator.clipboard.writeText(text);
      said.textContent = `Copied ${many(body.children.length, "row")} as CSV.`;
    } catch (error) {
      said.textContent = `This browser did not let the page copy (${error.message}).`;
    }
  }
  function tableSection() {
    const head = h("tr", {}, COLUMNS.map(([key, title, , kind]) => {
      const cell = h("th", { scope: "col", class: kind || null, "aria-sort": "none" }, h("button", {
        type: "button",
        onclick: () => {
          state.down = state.sort === key ? !state.down : ["top1", "top5"].includes(key);
          state.sort = key;
          fillTable();
        },
      }, title));
      heads.set(key, cell);
      return cell;
    }));
    return section("instances", "Instances", null,
      h("div", { class: "tools" },
        h("input", {
          type: "search", placeholder: "Filter, for example layer3 0.5", "aria-label": "Filter the rows",
          oninput: (event) => { state.filter = event.target.value; fillTable(); },
        }),
        h("label", {}, h("input", {
          type: "checkbox", onchange: (event) => { state.frontOnly = event.target.checked; fillTable(); },
        }), "Pareto-optimal only"),
        h("button", { type: "button", id: "copy", onclick: copy }, "Copy as CSV")),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of instances" },
        h("table", { id: "table" }, h("caption", { class: "unseen" }, "Costs and scores of all instances"),
          h("thead", {}, head), body)),
      said);
  }

  function pick(number, moves) {
    if (state.picked >= 0) rowElements[state.picked].removeAttribute("aria-selected");
    state.picked = number;
    const element = rowElements[number];
    element.setAttribute("aria-selected", "true");
    ring();
    if (moves) {
      if (!element.isConnected) {
        state.filter = "";
        state.frontOnly = false;
        for (const input of document.querySelectorAll("#instances input")) {
          if (input.type === "checkbox") input.checked = false;
          else input.value = "";
        }
        fillTable();
      }
      element.scrollIntoView({ block: "center" });
      element.querySelector("button").focus({ preventScroll: true });
    }
    for (const follow of followers) follow(rows[number]);
  }
  const followers = [];

  // Where instances shrink -----------------------------------------------------------------------------------------------

  function cellsOf(network, entry, order) {
    const largest = Math.max(...network.profile.flatMap((each) => each.maps.map(side)));
    return network.segments.map((segment, position) => {
      const map = entry.maps[position], height = side(map);
      const before = position ? side(entry.maps[position - 1]) : 0;
      return {
        instance: entry.instance, order, segment, position, side: height, shade: height / largest,
        changes: height !== before, macs: entry.macs[position],
        text: `${segment}\n${entry.instance}\nmap ${shapeText(map)}\n${scaled(entry.macs[position])} MACs`,
      };
    });
  }
  function stripSection() {
    const stripPlace = h("div", { class: "chart", id: "strip" }), spentPlace = h("div", { class: "chart", id: "spent" });
    const heading = h("h3", {}), show = (network) => {
      const order = [...network.profile].sort((a, b) => sum(b.macs) - sum(a.macs));
      draw(stripPlace, { ...doc.charts.strip, height: 19 * order.length }, { cells: order.flatMap((entry, number) => cellsOf(network, entry, number)) },
        `Height of the map after each of ${many(network.segments.length, "segment")} of ${network.name}, for `
        + `${many(order.length, "instance")}, the costliest first.`,
        (datum) => {
          const row = rows.find((each) => each.network === network.name && each.instance === datum.instance);
          if (row) pick(row.row, false);
        });
    };
    const detail = (network, instance) => {
      const entries = network.profile.filter((entry) => entry.instance === "full" || entry.instance === instance);
      heading.textContent = entries.length > 1 ? `MACs of ${instance} beside full` : "MACs of full";
      draw(spentPlace, { ...doc.charts.spent, height: 40 * entries.length }, { cells: entries.flatMap((entry, number) => cellsOf(network, entry, number)) },
        `MACs of each segment: ${entries.map((entry) => `${entry.instance} ${whole(sum(entry.macs))}`).join(", ")}.`);
    };
    let current = doc.networks[0];
    const choice = h("select", { onchange: (event) => { current = networkOf(event.target.value); show(current); detail(current, "full"); } },
      doc.networks.map((network) => h("option", {}, network.name)));
    followers.push((row) => {
      const network = networkOf(row.network);
      if (network !== current) {
        current = network;
        choice.value = network.name;
        show(network);
      }
      detail(network, row.instance);
    });
    later.push(() => {
      show(current);
      const cheap = rows.filter((row) => row.network === current.name && row.front && !row.cascade).sort((a, b) => a.macs - b.macs)[0];
      detail(current, cheap ? cheap.instance : "full");
    });
    return section("shrinks", "Where each instance shrinks",
      "A cell is the output of a segment, and its number the height of the map from there on; darker is larger. "
      + "Every segment behind a smaller map costs less.",
      doc.networks.length > 1 ? h("div", { class: "tools" }, h("label", {}, "Network", choice)) : null,
      h("div", { class: "tall", tabindex: 0, role: "region", "aria-label": "Maps of each instance" }, stripPlace), heading, spentPlace);
  }
  const sum = (values) => values.reduce((total, value) => total + value, 0);

  // Training -------------------------------------------------------------------------------------------------------------

  function trainingSection() {
    const loss = [], accuracy = [];
    for (const network of doc.networks) {
      for (const epoch of network.epochs) {
        const add = (points, series, value, unit) => points.push({
          series, epoch: epoch.epoch, value, text: `${series}\nepoch ${epoch.epoch}: ${value.toPrecision(4)}${unit}`,
        });
        if (epoch.loss != null) add(loss, network.name, epoch.loss, "");
        if (epoch.accuracy != null) add(accuracy, `${network.name}, training`, epoch.accuracy, " %");
        for (const [name, top1] of Object.entries(epoch.validation || {})) {
          add(accuracy, `${network.name}, validation of ${name}`, top1, " %");
        }
      }
    }
    if (!loss.length && !accuracy.length) {
      return section("training", "Training", "No epoch of a training is recorded: the weights were imported, or not trained.");
    }
    const [left, right] = [h("div", { class: "chart", id: "loss" }), h("div", { class: "chart", id: "accuracy" })];
    later.push(() => draw(left, doc.charts.loss, { points: loss }, `Training loss over ${many(loss.length, "epoch")}.`));
    later.push(() => draw(right, doc.charts.accuracy, { points: accuracy }, `Accuracy over epochs: ${many(accuracy.length, "value")}.`));
    return section("training", "Training",
      "Accuracy of the training is on augmented batches, each by the instance that its step drew; a validation is on held-out images.",
      h("div", { class: "pair" }, left, right));
  }

  // Searches -------------------------------------------------------------------------------------------------------------

  function searchSection(search, number) {
    const points = [], progress = [], count = {}, best = {};
    for (const trial of search.trials) {
      for (const run of trial.runs) {
        count[run] = (count[run] || 0) + 1;
        if (!(trial.reward <= best[run])) best[run] = trial.reward;
        progress.push({
          series: run, evaluations: count[run], value: best[run],
          text: `${run}\n${many(count[run], "network")} scored\nbest reward ${best[run].toPrecision(5)}`,
        });
      }
      points.push({
        series: trial.runs[0], macs: trial.macs, top1: trial.top1,
        text: `${trial.instance}\n${scaled(trial.macs)} MACs\ntop-1 ${percent(trial.top1)} % on held-out images\n${trial.runs.join(", ")}`,
      });
    }
    const scatter = h("div", { class: "chart trials" }), rise = h("div", { class: "chart progress" });
    if (search.trials.length > 1) later.push(() => draw(scatter, doc.charts.trials[number], { points },
      `Networks that ${search.series} scored: ${many(points.length, "mark")}.`));
    if (search.trials.length > 1) later.push(() => draw(rise, doc.charts.progress[number], { points: progress },
      `Best reward of each run of ${search.series} after each network.`));
    const winners = search.winners.length ? simpleTable("Winners", ["run", "networks scored", "network", "MACs", "of full", "held-out %", "test %"],
      search.winners.map((row) => [row.run, whole(row.evaluations), row.instance, whole(row.macs), share(row.relative), percent(row.heldout), percent(row.test)]),
      [0, 2]) : null;
    return h("div", {}, h("h3", {}, search.series), h("p", { class: "note" },
      `${many(search.trials.length, "network")} scored`
      + (search.budget == null ? "" : `; the dashed line is the budget, ${scaled(search.budget)} MACs`)
      + ". A network that an earlier run had scored stands at its place there."),
    search.trials.length > 1 ? h("div", { class: "pair" }, scatter, rise) : null, winners);
  }

  function simpleTable(caption, heads_, lines, texts) {
    return h("div", { class: "scroll short", tabindex: 0, role: "region", "aria-label": caption }, h("table", {}, h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, heads_.map((head, i) => h("th", { scope: "col", class: texts.includes(i) ? "text" : null }, head)))),
      h("tbody", {}, lines.map((line) => h("tr", {}, line.map((cell, i) => h("td", { class: texts.includes(i) ? "text wrap" : null }, cell)))))));
  }

  // Classes --------------------------------------------------------------------------------------------------------------

  const MOST_CLASSES = 40;
  function classSection(table, number) {
    const place = h("div", { class: "chart classes" }), heading = h("p", { class: "note" });
    const own = rows.filter((row) => row.series === table.series && table.top1[row.row]);
    const full = own.find((row) => row.instance === "full") || own[0];
    const cheapest = own.filter((row) => row.front).sort((a, b) => a.macs - b.macs)[0] || own[0];
    const show = (row) => {
      const [all, some] = [table.top1[full.row], table.top1[row.row]];
      const known = table.names.map((_, index) => index).filter((index) => all[index] != null);
      const listed = known.sort((a, b) => (all[b] - some[b]) - (all[a] - some[a]) || all[a] - all[b] || a - b).slice(0, MOST_CLASSES);
      const points = listed.flatMap((index, position) => [[full, all], ...(row === full ? [] : [[row, some]])].map(([which, values], i) => ({
        place: position, instance: which.instance, which: i, top1: values[index],
        text: `${table.names[index]}\n${which.instance}\ntop-1 ${percent(values[index])} % of ${many(table.images[index], "image")}`,
      })));
      const spec = { ...doc.charts.classes, height: 24 * listed.length, params: [{ name: "labels", value: listed.map((index) => table.names[index]) }] };
      heading.textContent = `${row.instance} beside full; the class that loses most comes first`
        + (listed.length < known.length ? ` (${listed.length} of ${known.length} classes)` : "") + ". Pick a different row in the chart or the table.";
      draw(place, spec, { points }, `Accuracy of ${many(listed.length, "class").replace("classs", "classes")} by full and by ${row.instance}.`);
    };
    followers.push((row) => { if (row.series === table.series && table.top1[row.row]) show(row); });
    later.push(() => show(cheapest));
    return h("div", {}, doc.classes.length > 1 ? h("h3", {}, table.series) : null, heading, place);
  }

  // Predictions ----------------------------------------------------------------------------------------------------------

  function confusionsOf(table) {
    const place = h("div", {}), name = (index) => table.names[index];
    const own = rows.filter((row) => row.series === table.series && table.confusions[row.row]);
    const full = own.find((row) => row.instance === "full") || own[0];
    const show = (row) => {
      const listed = (which) => h("div", {}, h("h3", {}, `Largest confusions of ${which.instance}`),
        table.confusions[which.row].length ? simpleTable(`Confusions of ${which.instance}`, ["class", "taken for", "images"],
          table.confusions[which.row].map(([label, predicted, count]) => [name(label), name(predicted), whole(count)]), [0, 1])
          : h("p", { class: "note" }, "None."));
      place.replaceChildren(h("div", { class: "pair" }, listed(full), row === full ? null : listed(row)));
    };
    followers.push((row) => { if (row.series === table.series && table.confusions[row.row]) show(row); });
    show(own.filter((row) => row.front).sort((a, b) => a.macs - b.macs)[0] || full);
    return h("div", {}, doc.predictions.length > 1 ? h("h3", {}, table.series) : null, place);
  }
  function hardOf(table) {
    const name = (index) => table.names[index];
    return h("div", {}, doc.predictions.length > 1 ? h("h3", {}, table.series) : null,
      table.images.length ? null : h("p", { class: "note" }, "There is none, or their pictures are not kept."),
      h("ul", { class: "pictures" }, table.images.map((image) => h("li", {},
        h("img", { src: image.picture, alt: `test image ${image.image}: ${name(image.label)}` }),
        h("strong", {}, name(image.label)), h("br", {}),
        `${image.instance} is right, ${share(image.relative)} of full; ${table.cheapest} says ${name(image.predicted)}`))));
  }

  // Origin ---------------------------------------------------------------------------------------------------------------

  function originSection() {
    return section("origin", "Origin", "Each artifact is known by the digest of its content, and made from the one that it names.",
      doc.networks.map((network) => [
        doc.networks.length > 1 ? h("h3", {}, network.name) : null,
        simpleTable(`Artifacts of ${network.name}`, ["tag", "kind", "digest", "made from"],
          network.lineage.map((link) => [link.tag || "", link.kind, h("code", { class: "whole" }, link.digest), link.subject ? h("code", {}, link.subject.slice(7, 19)) : ""]), [0, 1, 2, 3]),
        network.recipes.map((recipe, i) => h("details", { open: i === 0 && doc.networks.length === 1 },
          h("summary", {}, `Recipe of ${recipe.of}`), h("pre", {}, recipe.text))),
      ]),
      h("h3", {}, "Versions"),
      h("p", {}, Object.entries(doc.versions).map(([name, version]) => `${name} ${version}`).join(", ")));
  }

  // The page -------------------------------------------------------------------------------------------------------------

  const later = [];
  const contents = [];
  function section(id, title, lead, ...children) {
    contents.push([id, title]);
    return h("section", { id, "aria-labelledby": `${id}-title` },
      h("div", { class: "head" }, h("h2", { id: `${id}-title` }, title)), lead ? h("p", { class: "lead" }, lead) : null, ...children);
  }
  function fact(name, value, detail) {
    return h("div", {}, h("dt", {}, name), h("dd", {}, value, h("small", {}, detail)));
  }
  function factOf(network) {
    const own = rows.filter((row) => row.network === network.name && row.split === "test");
    const full = own.find((row) => row.instance === "full");
    if (!full) return null;
    const half = own.filter((row) => row.relative <= 0.5).sort((a, b) => b.top1 - a.top1)[0];
    return fact(network.name, `${percent(full.top1)} %`, `full, ${scaled(full.macs)} MACs`
      + (half ? `; within half of them ${percent(half.top1)} %, ${half.instance}` : ""));
  }
  function facts() {
    if (doc.networks.length > 1) return h("dl", { class: "facts" }, doc.networks.map(factOf));
    const first = rows.filter((row) => row.series === doc.series[0] && !row.cascade);
    const full = first.find((row) => row.instance === "full");
    if (!full) return null;
    const best = first.reduce((a, b) => (b.top1 > a.top1 ? b : a));
    const found = [fact("full", `${percent(full.top1)} %`, `${scaled(full.macs)} MACs, ${many(full.images, "image")}`)];
    const half = first.filter((row) => row.relative <= 0.5).sort((a, b) => b.top1 - a.top1)[0];
    const near = first.filter((row) => row.top1 >= full.top1 - 1).sort((a, b) => a.macs - b.macs)[0];
    if (half) found.push(fact("best within half the MACs", `${percent(half.top1)} %`, `${half.instance}, ${share(half.relative)} of full`));
    if (near) found.push(fact("least MACs within 1 point of full", share(near.relative), `${near.instance}, ${percent(near.top1)} %`));
    if (best !== full) found.push(fact("most accurate", `${percent(best.top1)} %`, `${best.instance}, ${share(best.relative)} of full`));
    return h("dl", { class: "facts" }, found);
  }

  const missing = doc.networks.flatMap((network) => {
    const command = `sdpctl eval-instances ${network.name}`;
    if (!network.evaluated) return h("p", { class: "note" }, `${network.name} has no evaluation here: `, h("code", {}, command), " makes one.");
    if (doc.predictions.some((table) => table.network === network.name)) return [];
    return h("p", { class: "note" }, `Confusions and hard images of ${network.name} are not shown, since its predictions are not kept: `,
      h("code", {}, `${command} --set evaluate.predictions=true`), " keeps them.");
  });
  const sections = [
    rows.length ? frontSection() : null,
    rows.length ? tableSection() : null,
    stripSection(),
    trainingSection(),
    doc.searches.length ? section("search", "Search", "What each search scored, on held-out images, and how the best rose.", doc.searches.map(searchSection)) : null,
    doc.classes.length ? section("classes", "Classes", null, doc.classes.map(classSection)) : null,
    doc.predictions.length ? section("confusions", "Confusions", null, doc.predictions.map(confusionsOf)) : null,
    doc.predictions.length ? section("hard", "Images that only costly instances get right",
      "Every instance that costs less than the one named is wrong about the image.", doc.predictions.map(hardOf)) : null,
    originSection(),
  ].filter(Boolean);
  const one = doc.networks.length === 1 ? doc.networks[0] : null;
  const described = (network) => `${network.arch} on ${network.dataset}, ${network.image_size} px, ${network.instances}`;
  page.append(
    h("header", {}, h("h1", {}, doc.title), one ? h("p", { class: "lead" }, described(one))
      : doc.networks.map((network) => h("p", { class: "lead" }, h("strong", {}, network.name), `: ${described(network)}`))),
    h("nav", { "aria-label": "Sections" }, contents.map(([id, title]) => h("a", { href: `#${id}` }, title))),
    h("main", {}, facts(), sections), h("footer", {}, missing), tip);
  if (rows.length) {
    fillTable();
    later.unshift(drawFront);
  }
  (async () => {
    for (const step of later) await step();
    document.documentElement.setAttribute("data-drawn", String(later.length));
  })();
})();
