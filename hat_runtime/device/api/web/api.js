// The device's API: figures, and an answer token by token.

const KEY = "hat.api-key";

export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** What the device, or the way to it, said in place of an answer; `status` 0: nothing came. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "This device does not answer.");
  }
  if (!reply.ok) throw new Refused(reply.status, await reason(reply));
  return reply;
}

async function reason(reply) {
  const text = await reply.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `status ${reply.status}`;
  }
}

/** The figures of the device, with the answers that ended after number `after`. */
export async function stats(after) {
  const reply = await request(`/v1/hat/stats?after=${after}`, { signal: AbortSignal.timeout(5000) })
    .catch((error) => { throw error.name === "AbortError" || error.name === "TimeoutError" ? new Refused(0, "This device does not answer.") : error; });
  return reply.json();
}

/** Stream an answer: `onTokens` gets lists of {text, kind}. Resolves to the usage. */
export async function answer({ model, messages, temperature, maxTokens, signal }, onTokens) {
  const body = {
    model, messages, temperature, max_tokens: maxTokens,
    stream: true, stream_options: { include_usage: true }, hat_token_kinds: true,
  };
  const reply = await request("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  let usage = null;
  for await (const event of events(reply.body)) {
    if (event === "[DONE]") return usage;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Refused(200, chunk.error.message);
    usage = chunk.usage ?? usage;
    const tokens = chunk.choices[0]?.hat?.tokens;
    if (tokens) onTokens(tokens);
  }
  throw new Refused(0, "The connection to this device broke off.");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return;
    }
    if (part.done) return;
    const all = (rest + part.value).split("\n\n");
    rest = all.pop();
    for (const event of all) if (event.startsWith("data: ")) yield event.slice(6);
  }
}
