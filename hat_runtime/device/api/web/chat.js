// The conversation: what is asked, and answers whose tokens show how they came about.

import { answer } from "./api.js";

const byId = (id) => document.getElementById(id);
const log = byId("log");
const KINDS = ["accepted", "alternative", "corrected", "plain", "unchecked"];

let messages = [];
let underWay = null;

/** Let the form work; `model()` is the name that the API wants, or null while it is not known. */
export function startChat(model) {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!underWay) ask(model());
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("ask").requestSubmit();
  });
  byId("stop").addEventListener("click", () => underWay?.abort());
  byId("new").addEventListener("click", () => {
    underWay?.abort();
    messages = [];
    log.replaceChildren();
    byId("question").focus();
  });
  byId("marks").addEventListener("change", (event) => {
    document.body.classList.toggle("unmarked", !event.target.checked);
  });
}

async function ask(model) {
  const question = byId("question").value.trim();
  if (!question) return;
  byId("welcome")?.remove();
  byId("question").value = "";
  add("question", question);
  const shown = add("answer");
  const asked = [...messages, { role: "user", content: question }];
  messages = asked;
  const abort = begin();
  let text = "";
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  try {
    const usage = await answer(
      {
        model, messages: asked, signal: abort.signal,
        temperature: Number(byId("temperature").value), maxTokens: Number(byId("max-tokens").value),
      },
      (tokens) => {
        for (const token of tokens) {
          counts[token.kind] += 1;
          text += token.text;
        }
        following(() => shown.append(...tokens.map(mark)));
      },
    );
    following(() => shown.after(summary(counts, usage)));
  } catch (error) {
    if (error.name !== "AbortError") fail(shown, error, text ? "" : question);
  } finally {
    if (underWay === abort) end();
    if (!text) shown.remove();
    // What was not answered is not part of the conversation. After "New chat" neither is this.
    if (messages === asked) messages = text ? [...asked, { role: "assistant", content: text }] : asked.slice(0, -1);
  }
}

function begin() {
  underWay = new AbortController();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  log.setAttribute("aria-busy", "true");
  return underWay;
}

function end() {
  underWay = null;
  byId("send").hidden = false;
  byId("stop").hidden = true;
  log.removeAttribute("aria-busy");
}

function add(kind, text = "") {
  const message = document.createElement("p");
  message.className = `message ${kind}`;
  message.textContent = text;
  following(() => log.append(message), kind === "question");
  return message;
}

function mark(token) {
  const span = document.createElement("span");
  span.className = `token ${token.kind}`;
  span.title = token.kind;
  span.textContent = token.text;
  return span;
}

function fail(shown, error, question) {
  const message = document.createElement("p");
  message.className = "message error";
  message.textContent = error.message;
  following(() => shown.after(message));
  if (question && !byId("question").value) byId("question").value = question;
}

function summary(counts, usage) {
  const parts = KINDS.filter((kind) => counts[kind]).map((kind) => [`${counts[kind]} ${kind}`, kind, counts[kind]]);
  const hat = usage?.hat;
  if (hat?.offline) parts.unshift(["answered by the small model alone, the cloud is away", "offline", true]);
  if (hat?.draft_tokens) parts.push([`${hat.draft_tokens} guessed`, "drafted", hat.draft_tokens]);
  if (hat?.rounds) parts.push([`${(usage.completion_tokens / hat.rounds).toFixed(2)} tokens a round`]);
  if (hat?.ttft_s != null) parts.push([`first after ${seconds(hat.ttft_s)}`]);
  if (hat?.tbt_s != null) parts.push([`then ${seconds(hat.tbt_s)} a token`]);
  const line = document.createElement("p");
  line.className = "counts";
  for (const [text, name, count] of parts) {
    const part = document.createElement("span");
    part.textContent = text;
    if (name) part.dataset[name] = count;
    line.append(part);
  }
  return line;
}

/** Change the log, and keep its end in sight if it was. */
function following(change, always = false) {
  const atEnd = always || log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** 0.0314 -> "31 ms", 1.25 -> "1.25 s" */
export function seconds(value) {
  return value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}
