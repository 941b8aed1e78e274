export interface EnvPair {
  key: string
  value: string
}
export interface EnvParse {
  pairs: EnvPair[]
  /** 1-based numbers of the lines that are neither blank, comment nor assignment. */
  bad: number[]
}

const assignment = /^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)$/s

/**
 * Reads the text of a `.env` file: `KEY=value`, optional `export`, `#` comments, single quotes (literal), double quotes
 * (with \n, \t, \r, \" and \\) and quoted values over several lines. A later assignment of a key wins, in the place of the first.
 */
export function parseDotenv(text: string): EnvParse {
  const lines = text.replaceAll('\r\n', '\n').split('\n')
  const found = new Map<string, string>()
  const bad: number[] = []
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i] ?? ''
    if (/^\s*(#.*)?$/.test(line)) continue
    const match = assignment.exec(line)
    if (!match) {
      bad.push(i + 1)
      continue
    }
    const key = match[1] ?? ''
    let rest = match[2] ?? ''
    const quote = rest[0]
    if (quote === '"' || quote === "'" || quote === '`') {
      const first = i
      let end = closing(rest, quote)
      while (end < 0 && i + 1 < lines.length) {
        i++
        rest += `\n${lines[i]}`
        end = closing(rest, quote)
      }
      if (end < 0) {
        // No closing quote anywhere: the quote is part of the value, and the following lines are lines of their own.
        i = first
        found.set(key, (match[2] ?? '').trim())
        continue
      }
      const inner = rest.slice(1, end)
      found.set(key, quote === '"' ? unescape(inner) : inner)
    } else {
      found.set(key, rest.replace(/(^|\s)#.*$/, '').trim())
    }
  }
  return { pairs: [...found].map(([key, value]) => ({ key, value })), bad }
}

function closing(text: string, quote: string): number {
  for (let i = 1; i < text.length; i++) {
    if (quote === '"' && text[i] === '\\') i++
    else if (text[i] === quote) return i
  }
  return -1
}

function unescape(text: string): string {
  return text.replace(/\\([ntr"\\$])/g, (_, c: string) => ({ n: '\n', t: '\t', r: '\r' })[c] ?? c)
}

/** Whether a variable's name suggests that its value should be kept as a secret. */
export function looksSecret(key: string): boolean {
  return /(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|PWD|CREDENTIALS?|DSN|PRIVATE)(_|$)/i.test(key) || /_URL$/i.test(key) && /(DATABASE|DB|REDIS|POSTGRES|MONGO|AMQP)/i.test(key)
}
