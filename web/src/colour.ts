/** Colours that mean something. What is chrome is in style.css. */

/** Okabe and Ito's eight, those that stand out on white and on black first; the black one is the page's own ink. */
export const HEAD_COLOURS = [
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#e69f00",
  "#56b4e9",
  "ink",
  "#f0e442",
] as const;

/** The colour's place in `HEAD_COLOURS`, by head. */
export type Slots = ReadonlyMap<number, number>;

/** Gives each head a colour: none for a single head or for more than eight; a head keeps the one it had. */
export function assign(before: Slots, heads: readonly number[]): Slots {
  const slots = new Map<number, number>();
  if (heads.length < 2 || heads.length > HEAD_COLOURS.length) return slots;
  for (const head of heads) {
    const had = before.get(head);
    if (had !== undefined) slots.set(head, had);
  }
  for (const head of heads) {
    if (slots.has(head)) continue;
    const taken = new Set(slots.values());
    slots.set(
      head,
      HEAD_COLOURS.findIndex((_, slot) => !taken.has(slot)),
    );
  }
  return slots;
}

/** The colour of one head, `ink` where it has none of its own. */
export function headColour(slots: Slots, head: number, ink: string): string {
  const colour = HEAD_COLOURS[slots.get(head) ?? 6];
  return colour === "ink" ? ink : colour;
}

/** How much a picture must be thinned out to stay readable: 1 is not at all. */
export interface Thinning {
  opacity: number;
  thickness: number;
}

/** Heads of one colour lie over each other, and many tokens lie close. */
export function thinning(sameColour: number, tokens: number): Thinning {
  return { opacity: 1 / Math.sqrt(Math.max(1, sameColour)), thickness: clamp(Math.max(0.4, 24 / tokens)) };
}

/** Opacity of a weight: from a breath at 0 to full at 1, steeper where most weights are. */
export function opacity(weight: number, thin: Thinning): number {
  return (0.05 + 0.95 * clamp(weight) ** 0.6) * thin.opacity;
}

/** Thickness of a weight's line in CSS pixels. */
export function thickness(weight: number, thin: Thinning): number {
  return 0.6 + 4.4 * clamp(weight) * thin.thickness;
}

function clamp(weight: number): number {
  return Math.min(1, Math.max(0, weight));
}

/** CSS backgrounds that draw one bar a head, as long as its weight, from the side where the lines are. */
export function bars(weights: readonly { weight: number; colour: string }[], from: "left" | "right"): string {
  const high = 100 / weights.length;
  return weights
    .map(({ weight, colour }, i) => {
      const faded = `color-mix(in srgb, ${colour} 28%, transparent)`;
      const top = weights.length === 1 ? 0 : (100 * i) / (weights.length - 1);
      return `linear-gradient(${faded}, ${faded}) ${from} ${top}% / ${100 * clamp(weight)}% ${high}% no-repeat`;
    })
    .join(", ");
}
