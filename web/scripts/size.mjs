// Holds the bundle to its budgets, in kB of brotli: the first page, every lazy route beyond it, the terminal, and the whole.
import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { brotliCompressSync } from 'node:zlib'

const root = new URL('../dist/', import.meta.url).pathname
const manifest = JSON.parse(await readFile(join(root, '.vite/manifest.json'), 'utf8'))

const sizes = new Map()
async function size(file) {
  if (!sizes.has(file)) {
    const body = await readFile(join(root, file))
    sizes.set(file, brotliCompressSync(body).byteLength / 1000)
  }
  return sizes.get(file)
}

/** Everything a chunk needs before it runs, styles included. */
function closure(key, into = new Set()) {
  const chunk = manifest[key]
  if (!chunk || into.has(chunk.file)) return into
  into.add(chunk.file)
  for (const css of chunk.css ?? []) into.add(css)
  for (const next of chunk.imports ?? []) closure(next, into)
  return into
}
async function total(files) {
  let sum = 0
  for (const file of files) sum += await size(file)
  return sum
}

const keys = Object.keys(manifest)
const routeKeys = keys.filter((k) => k.includes('?tsr-split=component'))
const entry = keys.find((k) => manifest[k].isEntry)
if (!entry || routeKeys.length === 0) throw new Error('the manifest has no entry or no lazy routes')

// The page most people open: shell, org, workloads list.
// Shell, org and list are part of the entry.
const first = closure(entry)
const rows = [['first page', await total(first), 130]]
for (const key of [...routeKeys, ...keys.filter((k) => manifest[k].isDynamicEntry && !routeKeys.includes(k))]) {
  const extra = [...closure(key)].filter((file) => !first.has(file))
  rows.push([key.replace('src/', '').replace('?tsr-split=component', ''), await total(extra), key.includes('terminal-screen') ? 80 : 40])
}
let whole = 0
for (const entryFile of await readdir(join(root, 'assets'))) if (/\.(js|css)$/.test(entryFile)) whole += await size(`assets/${entryFile}`)
rows.push(['everything', whole, 600])

let over = 0
for (const [name, kb, budget] of rows.sort((a, b) => b[1] - a[1])) {
  const bad = kb > budget
  if (bad) over++
  if (bad || kb > 5) console.log(`${bad ? 'OVER ' : 'ok   '} ${kb.toFixed(1).padStart(7)} kB of ${String(budget).padStart(3)}  ${name}`)
}
const firstFiles = [...first].length
console.log(`first page: ${firstFiles} files of script and style`)
// With the document, the theme script, the font and the two answers the list is drawn from, at most 15 requests.
if (firstFiles > 10) {
  console.error('more than 10 files before the first page is drawn')
  over++
}
if (over > 0) {
  console.error(`${over} budgets exceeded`)
  process.exit(1)
}
