const adjectives = ['amber', 'brave', 'calm', 'clever', 'coral', 'eager', 'gentle', 'lively', 'lucky', 'merry', 'nimble', 'quiet', 'rapid', 'sunny', 'swift', 'tidy', 'vivid', 'warm']
const nouns = ['badger', 'comet', 'crab', 'falcon', 'fern', 'heron', 'koala', 'lark', 'lobster', 'maple', 'otter', 'pebble', 'puffin', 'raven', 'reef', 'shell', 'tern', 'willow']

/** A friendly workload name that is not in `taken`, such as `swift-otter`; deterministic for a given `random`. */
export function suggestName(taken: ReadonlySet<string>, random: () => number = Math.random): string {
  const pick = (list: readonly string[]) => list[Math.floor(random() * list.length)] ?? 'workload'
  for (let i = 0; i < 50; i++) {
    const name = `${pick(adjectives)}-${pick(nouns)}`
    if (!taken.has(name)) return name
  }
  for (let n = 2; ; n++) if (!taken.has(`workload-${n}`)) return `workload-${n}`
}

/** Why a workload's name is refused, or undefined. The server has the last word; this one answers while typing. */
export function nameProblem(name: string): string | undefined {
  if (name === '') return 'Give it a name'
  if (name.length > 40) return 'At most 40 characters'
  if (!/^[a-z0-9-]+$/.test(name)) return 'Lower-case letters, digits and hyphens'
  if (!/^[a-z]/.test(name)) return 'Starts with a letter'
  if (name.endsWith('-') || name.includes('--')) return 'No hyphen at the end, no two in a row'
  return undefined
}
