import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { encode } from "../dev/madeup.ts";
import { Gone, type News, Problem } from "./protocol.ts";
import { httpSource } from "./source.ts";

/** Stands in for the browser's EventSource. */
class Events extends EventTarget {
  static readonly CLOSED = 2;
  static opened: Events[] = [];
  readonly url: string;
  readyState = 1;

  constructor(url: string) {
    super();
    this.url = url;
    Events.opened.push(this);
  }

  close() {
    this.readyState = Events.CLOSED;
  }

  say(name: string, data = "") {
    this.dispatchEvent(Object.assign(new Event(name), { data }));
  }
}

let page: EventTarget & { hidden: boolean };

beforeEach(() => {
  Events.opened = [];
  page = Object.assign(new EventTarget(), { hidden: false });
  vi.stubGlobal("EventSource", Events);
  vi.stubGlobal("document", page);
  vi.stubGlobal("location", { search: "" });
});

afterEach(() => {
  vi.unstubAllGlobals();
  vi.useRealTimers();
});

function answers(answer: Response | Error) {
  const fetched = vi.fn((_url: string, _options: RequestInit) =>
    answer instanceof Error ? Promise.reject(answer) : Promise.resolve(answer),
  );
  vi.stubGlobal("fetch", fetched);
  return fetched;
}

function listen() {
  const news: News[] = [];
  const life = new AbortController();
  httpSource("./").onTrial((each) => news.push(each), life.signal);
  return { news, life };
}

test("a question goes to the server as JSON, past the cache, and its reply is decoded", async () => {
  const fetched = answers(new Response(encode({ step: 7 })));
  const { facts } = await httpSource("./").ask({ ask: "step", step: 7 });
  expect(facts).toEqual({ step: 7 });
  const [url, options] = fetched.mock.calls[0];
  expect(url.startsWith("./api/answer?q=")).toBe(true);
  expect(new URL(url, "http://host/").searchParams.get("q")).toBe('{"ask":"step","step":7}');
  expect(options.cache).toBe("no-store");
});

test("the page's token goes with everything", async () => {
  vi.stubGlobal("location", { search: "?token=a%26b" });
  const fetched = answers(new Response(encode({})));
  const source = httpSource("./");
  await source.ask({ ask: "trial" });
  source.onTrial(() => {}, new AbortController().signal);
  for (const url of [fetched.mock.calls[0][0], Events.opened[0].url])
    expect(new URL(url, "http://host/").searchParams.get("token")).toBe("a&b");
});

test("a problem has the server's words", async () => {
  answers(new Response('{"error": "NoSuchStep", "message": "no step 7"}', { status: 404 }));
  await expect(httpSource("./").ask({ ask: "trial" })).rejects.toEqual(new Problem("no step 7"));
  answers(new Response("<html>", { status: 502, statusText: "Bad Gateway" }));
  await expect(httpSource("./").ask({ ask: "trial" })).rejects.toEqual(new Problem("The server said 502 Bad Gateway."));
});

test("nobody at home is another thing than a problem", async () => {
  answers(new TypeError("Failed to fetch"));
  await expect(httpSource("./").ask({ ask: "trial" })).rejects.toBeInstanceOf(Gone);
});

test("changes, problems and silence are heard", () => {
  const { news } = listen();
  Events.opened[0].say("trial", '{"steps": [3]}');
  Events.opened[0].say("problem", '{"message": "damaged"}');
  Events.opened[0].say("error");
  expect(Events.opened.map(({ url }) => url)).toEqual(["./api/events"]);
  expect(news[0]).toEqual({ steps: [3] });
  expect(news[1]).toEqual(new Problem("damaged"));
  expect(news[2]).toBeInstanceOf(Gone);
});

test("a stream that the browser gave up is opened anew, one that it tries itself is not", () => {
  vi.useFakeTimers();
  listen();
  Events.opened[0].say("error");
  vi.advanceTimersByTime(5000);
  expect(Events.opened).toHaveLength(1);
  Events.opened[0].readyState = Events.CLOSED;
  Events.opened[0].say("error");
  vi.advanceTimersByTime(5000);
  expect(Events.opened).toHaveLength(2);
});

test("a hidden page holds no connection", () => {
  const { life } = listen();
  page.hidden = true;
  page.dispatchEvent(new Event("visibilitychange"));
  expect(Events.opened.map(({ readyState }) => readyState)).toEqual([2]);
  page.hidden = false;
  page.dispatchEvent(new Event("visibilitychange"));
  expect(Events.opened.map(({ readyState }) => readyState)).toEqual([2, 1]);
  life.abort();
  page.dispatchEvent(new Event("visibilitychange"));
  expect(Events.opened.map(({ readyState }) => readyState)).toEqual([2, 2]);
});
