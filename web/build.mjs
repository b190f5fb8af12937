// Builds the one bundle. Its first line names the sources it was built from, so that a Python test can tell a stale
// bundle without Node. The dev harness's made-up source goes to dist/, which is not committed.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { context, transform } from "esbuild";

process.chdir(import.meta.dirname);

function sourcesHash() {
  const names = readdirSync("src", { recursive: true })
    .map((name) => `src/${name.replaceAll("\\", "/")}`)
    .filter((name) => /\.(tsx?|css)$/.test(name) && !/\.test\.tsx?$/.test(name));
  const hash = createHash("sha256");
  for (const name of [...names, "build.mjs", "package-lock.json"].sort())
    hash.update(name).update("\0").update(readFileSync(name)).update("\0");
  return hash.digest("hex");
}

const styleText = {
  name: "style-text",
  setup(build) {
    build.onLoad({ filter: /\.css$/ }, async ({ path }) => {
      const { code } = await transform(await readFile(path, "utf8"), { loader: "css", minify: true, target: "es2022" });
      return { contents: code.trim(), loader: "text" };
    });
  },
};

const shared = { bundle: true, format: "esm", target: "es2022", logLevel: "warning" };
const contexts = await Promise.all([
  context({
    ...shared,
    entryPoints: ["src/main.tsx"],
    outfile: "../src/headscope/static/headscope.js",
    minify: true,
    legalComments: "inline",
    jsx: "automatic",
    jsxImportSource: "preact",
    plugins: [styleText],
    banner: { js: `// headscope web bundle; sources sha256:${sourcesHash()}` },
  }),
  context({ ...shared, entryPoints: ["dev/madeup.ts"], outfile: "dist/madeup.js" }),
]);

if (process.argv.includes("--watch")) await Promise.all(contexts.map((each) => each.watch()));
else for (const each of contexts) await each.rebuild().finally(() => each.dispose());
