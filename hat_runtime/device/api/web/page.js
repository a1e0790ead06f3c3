// The page: asks the device for its figures once a second, and shows them beside the chat.

import { setKey, stats } from "./api.js";
import { seconds, startChat } from "./chat.js";
import { Plot } from "./plots.js";

const EVERY_MS = 1000;
const byId = (id) => document.getElementById(id);
const figures = byId("figures");

const share = (value) => `${Math.round(value * 100)} %`;
const rate = (bytes) => {
  const mbit = (bytes * 8) / 1e6;
  return `${mbit < 10 ? mbit.toFixed(1) : Math.round(mbit)} Mbit/s`;
};
const chunk = (tokens) => (tokens === 0 ? "whole prompt" : `${Math.round(tokens)} tokens`);

const plots = {
  ttft: new Plot(figures, "ttft", "TTFT", seconds, "time to first token, each answer; dashed: predicted"),
  tbt: new Plot(figures, "tbt", "TBT", seconds, "time between tokens, mean of each answer"),
  chunk: new Plot(figures, "chunk", "Chunk size", chunk, "of the latest prompt"),
  uplink: new Plot(figures, "uplink", "Uplink", rate, "to the cloud, as the device sees it"),
  rtt: new Plot(figures, "rtt", "RTT", seconds, "round trip to the cloud, without its work"),
  acceptance: new Plot(figures, "acceptance", "Acceptance", share, "of the last hundred guesses or so", 1),
};

let model = null;
let seen = 0;
let started = 0;

function show(now) {
  model = now.model;
  document.title = `HAT ${model}`;
  byId("model").textContent = now.mode && now.mode !== "hat" ? `${model}, mode ${now.mode}` : model;
  const { ok, reason, address } = now.cloud;
  byId("cloud").dataset.state = ok ? "ok" : ok === false ? "away" : "unknown";
  byId("cloud-text").textContent = ok ? `cloud ${address}` : ok === false ? "no cloud" : "asking the cloud";
  byId("offline-legend").hidden = now.offline !== "draft-only";
  const alone = now.offline === "draft-only" ? " The small model answers alone meanwhile; such answers are marked." : "";
  trouble(ok === false ? `The cloud does not answer: ${reason}.${alone}` : "");
  byId("drafting").textContent = now.drafting === undefined ? "" : now.drafting ? "drafting on" : "drafting off";
  const { running, waiting, idle } = now.sessions;
  byId("sessions").textContent = `${running} running, ${waiting} waiting, ${idle} kept`;
  if (now.recent) plot(now);
}

function plot(now) {
  if (now.started !== started) [started, seen] = [now.started, 0];
  for (const answer of now.recent) {
    if (answer.number <= seen) continue;
    seen = answer.number;
    plots.ttft.add(answer.ttft_s, answer.predicted_ttft_s);
    plots.tbt.add(answer.tbt_s);
  }
  plots.chunk.add(now.chunk_tokens);
  plots.uplink.add(now.uplink_bytes_per_s);
  plots.rtt.add(now.rtt_s);
  plots.acceptance.add(now.acceptance);
  const latest = [...now.running].reverse();
  const last = (plot) => plot.points.at(-1)?.value;
  plots.ttft.draw(latest.find((one) => one.ttft_s != null)?.ttft_s ?? last(plots.ttft));
  plots.tbt.draw(latest.find((one) => one.tbt_s != null)?.tbt_s ?? last(plots.tbt));
  plots.chunk.draw(now.chunk_tokens);
  plots.uplink.draw(now.uplink_bytes_per_s);
  plots.rtt.draw(now.rtt_s);
  plots.acceptance.draw(now.acceptance);
}

function trouble(text) {
  if (byId("trouble").textContent !== text) byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

async function look() {
  if (!document.hidden) {
    try {
      show(await stats(started ? seen : 0));
      byId("key-form").hidden = true;
    } catch (error) {
      byId("key-form").hidden = error.status !== 401;
      byId("cloud").dataset.state = "away";
      byId("cloud-text").textContent = error.status === 401 ? "no key" : "no device";
      trouble(error.status === 401 ? "" : error.message);
    }
  }
  setTimeout(look, EVERY_MS);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  byId("key").value = "";
});

startChat(() => model);
look();
