/** Sources of replies. The views know nothing else about the outside. */
import { decode, Gone, type News, Problem, type Source } from "./protocol.ts";

const RETRY_MS = 2000;
const SILENCE = "The server does not answer.";

/**
 * The live page's server.
 *
 * Args:
 *   base: where `api/` lies, ending in a slash.
 *   token: passed on with every request; by default the page's own.
 */
export function httpSource(base: string, token = new URLSearchParams(location.search).get("token") ?? ""): Source {
  const url = (path: string, query: Record<string, string>) => {
    const words = new URLSearchParams(token ? { ...query, token } : query).toString();
    return `${base}api/${path}${words && `?${words}`}`;
  };
  return {
    async ask(question) {
      // Not from the browser's cache: another run may be served at this address since.
      const answer = await fetch(url("answer", { q: JSON.stringify(question) }), { cache: "no-store" }).catch(() => {
        throw new Gone(SILENCE);
      });
      if (!answer.ok) throw await problem(answer);
      return decode(await answer.arrayBuffer());
    },
    onTrial: (fn, signal) => listen(url("events", {}), fn, signal),
  };
}

async function problem(answer: Response): Promise<Problem> {
  const said = await answer.text();
  try {
    return new Problem((JSON.parse(said) as { message: string }).message);
  } catch {
    return new Problem(`The server said ${answer.status} ${answer.statusText}.`);
  }
}

function listen(url: string, fn: (news: News) => void, signal: AbortSignal): void {
  let events: EventSource | undefined;
  let retry = 0;
  const open = () => {
    close();
    if (document.hidden) return;
    const mine = new EventSource(url);
    events = mine;
    mine.addEventListener("trial", (event) => fn(JSON.parse(event.data)));
    mine.addEventListener("problem", (event) => fn(new Problem(JSON.parse(event.data).message)));
    mine.addEventListener("error", () => {
      fn(new Gone(SILENCE));
      // EventSource comes back by itself, but not from an answer other than 200.
      if (mine.readyState === EventSource.CLOSED) retry = setTimeout(open, RETRY_MS);
    });
  };
  const close = () => {
    clearTimeout(retry);
    events?.close();
  };
  // A browser grants an origin six connections; a page nobody sees takes none.
  document.addEventListener("visibilitychange", open, { signal });
  signal.addEventListener("abort", close);
  open();
}
