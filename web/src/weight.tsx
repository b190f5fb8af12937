/** A number with its exact value. */
import type { Look } from "./lines.ts";
import { weightText } from "./words.ts";

/** One exact weight; with several heads, whose it is. */
export function Weight({ look, heads, colour }: { look: Look; heads: number[]; colour: string | null }) {
  const { slot, query, key, weight } = look;
  return (
    <span class="weight" data-weight={weight} data-query={query} data-key={key} data-head={heads[slot]}>
      {colour && (
        <span class="head" style={{ "--mark": colour }}>
          {heads[slot]}
        </span>
      )}
      <span class="number">{weightText(weight)}</span>
    </span>
  );
}
