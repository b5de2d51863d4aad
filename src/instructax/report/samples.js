// Shows the embedded samples that match the filters. All text comes from policies and is
// inserted as text nodes only, never as HTML.
"use strict";

const PAGE_SIZE = 20; // prompts that are shown at first, and added by "more"
const MAX_OPACITY = 0.6; // of a token's color
const MIN_OPACITY = 0.02; // fainter colors are left out
const LIKELIER = "232, 122, 0"; // RGB, orange: the policy makes the token likelier than SFT
const LESS_LIKELY = "31, 119, 180"; // RGB, blue

const byId = (id) => document.getElementById(id);
const samples = JSON.parse(byId("samples-data").textContent);
let numShown = PAGE_SIZE;

function createElement(tag, className, text) {
  const element = document.createElement(tag);
  if (className) {
    element.className = className;
  }
  if (text !== undefined) {
    element.textContent = text;
  }
  return element;
}

function selectedRun() {
  return samples.runs[byId("run").value || 0];
}

function sizesOf(run) {
  return [...new Set(run.columns.map((column) => column.size))];
}

// Replaces the options of a select element, and keeps the selected value if it still exists.
function setOptions(select, options) {
  const oldValue = select.value;
  select.replaceChildren(...options);
  if (options.some((option) => option.value === oldValue)) {
    select.value = oldValue;
  }
}

function updateFilters() {
  const run = selectedRun();
  const sizes = sizesOf(run);
  const sizeOptions = sizes.map((size) => new Option(size, size));
  setOptions(byId("size"), [new Option("all sizes", ""), ...sizeOptions]);

  const useCases = new Set(run.prompts.map((prompt) => prompt.useCase));
  const useCaseOptions = [...useCases].sort().map((name) => new Option(name, name));
  setOptions(byId("use-case"), [new Option("all use cases", ""), ...useCaseOptions]);
}

function matches(prompt, useCase, text) {
  if (useCase && prompt.useCase !== useCase) {
    return false;
  }
  if (!text || prompt.text.toLowerCase().includes(text)) {
    return true;
  }
  return prompt.responses.some((response) =>
    response.pieces.join("").toLowerCase().includes(text),
  );
}

function tokenElement(piece, logRatio) {
  const shownText = piece === samples.endOfText ? "\u25a0" : piece;
  const element = createElement("span", "", shownText);
  element.title = `log-ratio ${logRatio}`;

  const share = Math.min(1, Math.abs(logRatio) / samples.fullColorNats);
  const opacity = share * MAX_OPACITY;
  if (opacity > MIN_OPACITY) {
    const color = logRatio > 0 ? LIKELIER : LESS_LIKELY;
    element.style.backgroundColor = `rgba(${color}, ${opacity})`;
  }
  return element;
}

function responseCard(run, response, hasSizeInTitle) {
  const { size, policy } = run.columns[response.column];
  const card = createElement("div", "card");
  card.dataset.policy = policy;
  const title = hasSizeInTitle ? `${policy}, ${size}` : policy;
  card.append(createElement("h4", "", title));

  const text = createElement("p", "response");
  response.pieces.forEach((piece, index) => {
    text.append(tokenElement(piece, response.logRatios[index]));
  });
  card.append(text);

  const score = response.score.toFixed(2);
  const utility = response.utility.toFixed(2);
  card.append(createElement("p", "numbers", `score ${score} \u00b7 utility ${utility}`));
  for (const fault of response.faults) {
    card.append(createElement("span", "fault", fault));
  }
  return card;
}

function promptElement(run, prompt, size) {
  const article = createElement("article", "sample");
  article.append(createElement("p", "use-case", prompt.useCase));
  article.append(createElement("p", "prompt", prompt.text));

  const cards = createElement("div", "cards");
  const hasSizeInTitle = !size && sizesOf(run).length > 1;
  for (const response of prompt.responses) {
    if (!size || run.columns[response.column].size === size) {
      cards.append(responseCard(run, response, hasSizeInTitle));
    }
  }
  article.append(cards);
  return article;
}

function showSamples() {
  const run = selectedRun();
  const size = byId("size").value;
  const useCase = byId("use-case").value;
  const text = byId("text").value.trim().toLowerCase();

  const found = run.prompts.filter((prompt) => matches(prompt, useCase, text));
  byId("count").textContent = `${found.length} of ${run.prompts.length} prompts`;
  byId("more").hidden = found.length <= numShown;
  const shown = found.slice(0, numShown);
  byId("list").replaceChildren(...shown.map((prompt) => promptElement(run, prompt, size)));
}

function showFirstSamples() {
  numShown = PAGE_SIZE;
  showSamples();
}

const runOptions = samples.runs.map((run, index) => new Option(run.name, index));
setOptions(byId("run"), runOptions);
byId("run").addEventListener("change", () => {
  updateFilters();
  showFirstSamples();
});
for (const id of ["size", "use-case", "text"]) {
  byId(id).addEventListener("input", showFirstSamples);
}
byId("more").addEventListener("click", () => {
  numShown += PAGE_SIZE;
  showSamples();
});
updateFilters();
showSamples();
