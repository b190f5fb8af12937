/** The bundle's door. */
import { render } from "preact";
import { App } from "./app.tsx";
import type { Source } from "./protocol.ts";
import { State } from "./state.ts";
import style from "./style.css";

export type { Source } from "./protocol.ts";
export { httpSource } from "./source.ts";

/** Shows a run in `el`, in a shadow root, until `signal` aborts. */
export function mount(el: HTMLElement, source: Source, signal: AbortSignal = new AbortController().signal): void {
  const root = el.attachShadow({ mode: "open" });
  const css = document.createElement("style");
  css.textContent = style;
  const box = document.createElement("div");
  box.className = "frame";
  root.append(css, box);
  render(<App state={new State(source, signal)} />, box);
  signal.addEventListener("abort", () => render(null, box));
}
