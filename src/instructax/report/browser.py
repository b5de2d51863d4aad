"""The samples of a report, for reading: all policies side by side, in a page without a
server.

The samples are JSON inside the page; the script shows those that fit the filters, as text
and never as HTML.
"""

import json
from typing import Any

from instructax.data.tokenizer import END_OF_TEXT
from instructax.report.judging import FLAGS, TRUTH, Reading, asked_about
from instructax.report.results import response_of

FULL_COLOUR = 3.0  # nats: of the log-ratio that has it
PROMPTS = 300  # on a page, seeds together: it stays below 5 MB; all are in samples.jsonl
GOOD = {"hallucinates": False}  # the value of a flag that is no fault; True for the others
FAULTS = {
    "attempts": "fails the task",
    "constraint": "breaks the constraint",
    "hallucinates": "hallucinates",
    "appropriate": "inappropriate",
    "truthful": "untrue",
}  # in the words of table 3, in the order of FLAGS


def samples_of(reading: Reading, count: int) -> dict[str, Any]:
    """The first `count` prompts of a seed with all answers: each is [column, score,
    utility, faults, pieces, KLs]."""
    experiment = reading.experiment
    columns = list(reading.answers)
    records = {
        (size.name, policy): rows
        for size in experiment.sizes
        for policy, rows in size.samples.items()
    }
    asked = {flag: asked_about(experiment, flag) for flag in FLAGS}
    prompts = []
    for i, prompt in enumerate(experiment.prompts[:count]):
        answers = []
        for column, key in enumerate(columns):
            record, judged = records[key][i], reading.answers[key]
            faults = [
                FAULTS[flag]
                for flag in FLAGS
                if asked[flag][i] and judged.flags[flag][i] != GOOD.get(flag, True)
            ]
            pieces = record.get("pieces") or [response_of(record)]
            kl = [round(x, 2) for x in record.get("token_kl") or [0.0] * len(pieces)]
            score, utility = (
                round(float(judged.scores[i]), 2),
                round(float(judged.opinions[TRUTH][i]), 2),
            )
            answers.append([column, score, utility, faults, pieces, kl])
        prompts.append(
            {"text": prompt, "use": experiment.tasks[prompt].use, "answers": answers}
        )
    return {
        "run": experiment.name,
        "columns": [list(column) for column in columns],
        "prompts": prompts,
    }


def embedded(value: Any) -> str:
    """JSON that can stand in a <script> element: nothing in it can end the element or begin
    a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def browser(readings: list[Reading]) -> str:
    """The section's HTML: filters, an empty list, the data and the script that fills the
    list."""
    runs = [samples_of(reading, PROMPTS // len(readings)) for reading in readings]
    script = SCRIPT.replace("FULL_COLOUR", str(FULL_COLOUR)).replace(
        "END_OF_TEXT", json.dumps(END_OF_TEXT)
    )
    return (
        '<div class="filters">'
        '<label>run <select id="run"></select></label> <label>size <select id="size"></select></label> '
        '<label>use case <select id="use"></select></label> '
        '<label>text <input id="text" type="search" placeholder="in prompt or responses"></label> '
        '<span id="count" role="status"></span></div><div id="list"></div>'
        '<button id="more" type="button">more</button>'
        f'<script type="application/json" id="samples">{embedded(runs)}</script><script>{script}</script>'
    )


SCRIPT = """
"use strict";
const runs = JSON.parse(document.getElementById("samples").textContent);
const by = id => document.getElementById(id), PAGE = 20;
let shown = PAGE;
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
function fill(select, values, all) {
  const old = select.value;
  select.replaceChildren(...(all ? [new Option(all, "")] : []), ...values.map(v => new Option(v[0], v[1])));
  if ([...select.options].some(o => o.value === old)) select.value = old;
}
function choices() {
  const run = runs[by("run").value || 0];
  fill(by("size"), [...new Set(run.columns.map(c => c[0]))].map(n => [n, n]), "all sizes");
  fill(by("use"), [...new Set(run.prompts.map(p => p.use))].sort().map(n => [n, n]), "all use cases");
}
function tokens(pieces, kl) {
  const text = make("p", "response");
  pieces.forEach((piece, i) => {
    const span = make("span", "", piece === END_OF_TEXT ? "\\u25a0" : piece);
    const strength = Math.min(1, Math.abs(kl[i]) / FULL_COLOUR) * 0.6;
    if (strength > 0.02) span.style.backgroundColor = `rgba(${kl[i] > 0 ? "232,122,0" : "31,119,180"},${strength})`;
    span.title = `log-ratio ${kl[i]}`;
    text.append(span);
  });
  return text;
}
function card(run, answer) {
  const [column, score, utility, faults, pieces, kl] = answer, [size, policy] = run.columns[column];
  const node = make("div", "card");
  node.dataset.policy = policy;
  node.append(make("h4", "", by("size").value || run.sizes === 1 ? policy : `${policy}, ${size}`), tokens(pieces, kl));
  node.append(make("p", "numbers", `score ${score.toFixed(2)} \\u00b7 utility ${utility.toFixed(2)}`));
  faults.forEach(fault => node.append(make("span", "fault", fault)));
  return node;
}
function draw() {
  const run = runs[by("run").value || 0], use = by("use").value, size = by("size").value;
  const text = by("text").value.trim().toLowerCase();
  const fits = p => (!use || p.use === use) && (!text || p.text.toLowerCase().includes(text) ||
    p.answers.some(a => a[4].join("").toLowerCase().includes(text)));
  const found = run.prompts.filter(fits);
  by("count").textContent = `${found.length} of ${run.prompts.length} prompts`;
  by("more").hidden = found.length <= shown;
  by("list").replaceChildren(...found.slice(0, shown).map(p => {
    const node = make("article", "prompt"), cards = make("div", "cards");
    node.append(make("p", "use", p.use), make("p", "asked", p.text), cards);
    cards.append(...p.answers.filter(a => !size || run.columns[a[0]][0] === size).map(a => card(run, a)));
    return node;
  }));
}
runs.forEach(run => { run.sizes = new Set(run.columns.map(c => c[0])).size; });
fill(by("run"), runs.map((run, i) => [run.run, i]));
by("run").addEventListener("change", () => { choices(); shown = PAGE; draw(); });
["size", "use", "text"].forEach(id => by(id).addEventListener("input", () => { shown = PAGE; draw(); }));
by("more").addEventListener("click", () => { shown += PAGE; draw(); });
choices();
draw();
"""
