// Writes a .br and a .gz beside every text file of dist, so that the server never compresses while it answers.
import { readdir, readFile, writeFile } from 'node:fs/promises'
import { extname, join } from 'node:path'
import { promisify } from 'node:util'
import { brotliCompress, constants, gzip } from 'node:zlib'

const brotli = promisify(brotliCompress)
const gz = promisify(gzip)
const kinds = new Set(['.js', '.css', '.svg', '.txt', '.json'])
const root = new URL('../dist/', import.meta.url).pathname

let files = 0
for (const entry of await readdir(root, { recursive: true, withFileTypes: true })) {
  // index.html carries a nonce per response and is compressed by nobody.
  if (!entry.isFile() || !kinds.has(extname(entry.name)) || entry.parentPath.includes('.vite')) continue
  const path = join(entry.parentPath, entry.name)
  const body = await readFile(path)
  if (body.byteLength < 1024) continue
  const [br, z] = await Promise.all([
    brotli(body, { params: { [constants.BROTLI_PARAM_QUALITY]: 11, [constants.BROTLI_PARAM_SIZE_HINT]: body.byteLength } }),
    gz(body, { level: 9 }),
  ])
  await Promise.all([writeFile(`${path}.br`, br), writeFile(`${path}.gz`, z)])
  files++
}
console.log(`precompressed ${files} files`)
