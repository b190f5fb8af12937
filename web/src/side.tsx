/** A side of the page: open beside the picture, or folded where there is no room. */
import type { ComponentChildren } from "preact";

/** One side, with its title and what is said of it while it is folded. */
export function Side(props: {
  name: string;
  title: string;
  hint: string;
  narrow: boolean;
  children: ComponentChildren;
}) {
  const { name, title, hint, narrow, children } = props;
  if (!narrow)
    return (
      // biome-ignore lint/a11y/noNoninteractiveTabindex: a region that scrolls must be reachable by keyboard
      <section class={`side ${name}`} aria-label={title} tabIndex={0}>
        <h2>{title}</h2>
        {children}
      </section>
    );
  return (
    <details class={`side ${name}`}>
      <summary>
        <span class="title">{title}</span> <span class="hint">{hint}</span>
      </summary>
      {children}
    </details>
  );
}
