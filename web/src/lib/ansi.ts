export interface Span {
  text: string
  /** Palette index 0–15, or a CSS colour. */
  fg?: number | string
  bg?: number | string
  bold?: boolean
  dim?: boolean
  italic?: boolean
  underline?: boolean
}

// CSI, OSC (ended by BEL or ST) and two-character escapes. Only SGR (…m) has a meaning in a log line; the rest is dropped.
// oxlint-disable-next-line no-control-regex
const escape = /\x1b(?:\[([0-9;:?]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[@-Z\\-_])/g
// oxlint-disable-next-line no-control-regex
const control = /[\x00-\x08\x0b-\x1f\x7f]/g

/** A terminal shows what follows the last carriage return; so does a log line with a progress bar in it. */
export function collapseReturns(line: string): string {
  const trimmed = line.replace(/\r+$/, '')
  const last = trimmed.lastIndexOf('\r')
  return last < 0 ? trimmed : trimmed.slice(last + 1)
}

export function stripAnsi(line: string): string {
  return line.replace(escape, '').replace(control, '')
}

/** Splits one line into spans of one style each. Never throws, whatever the bytes. */
export function parseAnsi(line: string): Span[] {
  if (!line.includes('\x1b')) {
    const text = line.replace(control, '')
    return text === '' ? [] : [{ text }]
  }
  const spans: Span[] = []
  let style: Omit<Span, 'text'> = {}
  let at = 0
  const emit = (raw: string) => {
    const text = raw.replace(control, '')
    if (text !== '') spans.push({ ...style, text })
  }
  escape.lastIndex = 0
  for (let match = escape.exec(line); match; match = escape.exec(line)) {
    emit(line.slice(at, match.index))
    at = escape.lastIndex
    if (match[2] === 'm') style = sgr(style, match[1] ?? '')
  }
  emit(line.slice(at))
  return spans
}

function sgr(from: Omit<Span, 'text'>, params: string): Omit<Span, 'text'> {
  let style = { ...from }
  const codes = params.split(/[;:]/).map((p) => (p === '' ? 0 : Number(p)))
  for (let i = 0; i < codes.length; i++) {
    const code = codes[i] ?? 0
    if (code === 0) style = {}
    else if (code === 1) style.bold = true
    else if (code === 2) style.dim = true
    else if (code === 3) style.italic = true
    else if (code === 4) style.underline = true
    else if (code === 22) {
      delete style.bold
      delete style.dim
    } else if (code === 23) delete style.italic
    else if (code === 24) delete style.underline
    else if (code >= 30 && code <= 37) style.fg = code - 30
    else if (code >= 90 && code <= 97) style.fg = code - 82
    else if (code === 39) delete style.fg
    else if (code >= 40 && code <= 47) style.bg = code - 40
    else if (code >= 100 && code <= 107) style.bg = code - 92
    else if (code === 49) delete style.bg
    else if (code === 38 || code === 48) {
      let colour: number | string | undefined
      if (codes[i + 1] === 5) {
        colour = indexed(codes[i + 2] ?? 0)
        i += 2
      } else if (codes[i + 1] === 2) {
        colour = `rgb(${[codes[i + 2], codes[i + 3], codes[i + 4]].map((c) => Math.min(255, Math.max(0, c ?? 0))).join(' ')})`
        i += 4
      }
      if (colour !== undefined) {
        if (code === 38) style.fg = colour
        else style.bg = colour
      }
    }
  }
  return style
}

function indexed(n: number): number | string {
  if (n < 16) return Math.max(0, n)
  if (n >= 232) {
    const grey = 8 + (Math.min(n, 255) - 232) * 10
    return `rgb(${grey} ${grey} ${grey})`
  }
  const level = (v: number) => (v === 0 ? 0 : 55 + v * 40)
  const c = n - 16
  return `rgb(${level(Math.floor(c / 36))} ${level(Math.floor(c / 6) % 6)} ${level(c % 6)})`
}
