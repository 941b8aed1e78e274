const ms1 = new Intl.NumberFormat('en', { maximumFractionDigits: 1, minimumFractionDigits: 1 })
const ms0 = new Intl.NumberFormat('en', { maximumFractionDigits: 0 })
const absolute = new Intl.DateTimeFormat('en-GB', { dateStyle: 'medium', timeStyle: 'medium' })
const relative = new Intl.RelativeTimeFormat('en', { numeric: 'auto', style: 'short' })

/** A duration for people: `7.3 ms`, `412 ms`, `6.2 s`, `3 min 20 s`. */
export function duration(ms: number): string {
  if (!Number.isFinite(ms) || ms < 0) return '–'
  if (ms < 100) return `${ms1.format(ms)} ms`
  if (ms < 1000) return `${ms0.format(ms)} ms`
  if (ms < 60_000) return `${ms1.format(ms / 1000)} s`
  const minutes = Math.floor(ms / 60_000)
  const seconds = Math.round((ms % 60_000) / 1000)
  if (minutes < 60) return seconds === 0 ? `${minutes} min` : `${minutes} min ${seconds} s`
  const hours = Math.floor(minutes / 60)
  if (hours < 48) return minutes % 60 === 0 ? `${hours} h` : `${hours} h ${minutes % 60} min`
  return `${Math.floor(hours / 24)} days`
}

/** An estimate, to a precision nobody will hold against it: `45 s`, `3 min`. */
export function roughly(ms: number): string {
  if (ms < 60_000) return `${Math.max(1, Math.round(ms / 1000))} s`
  return `${Math.round(ms / 60_000)} min`
}

/** `just now`, `5 min. ago`, `yesterday`; both arguments in milliseconds since 1970. */
export function ago(then: number, now: number): string {
  const seconds = Math.round((then - now) / 1000)
  const distance = Math.abs(seconds)
  if (distance < 10) return 'just now'
  if (distance < 60) return relative.format(seconds, 'second')
  if (distance < 3600) return relative.format(Math.round(seconds / 60), 'minute')
  if (distance < 86_400) return relative.format(Math.round(seconds / 3600), 'hour')
  if (distance < 86_400 * 30) return relative.format(Math.round(seconds / 86_400), 'day')
  return new Intl.DateTimeFormat('en-GB', { dateStyle: 'medium' }).format(then)
}

export function dateTime(iso: string): string {
  const date = new Date(iso)
  return Number.isNaN(date.getTime()) ? iso : absolute.format(date)
}

/** Memory in MiB as people say it: `256 MiB`, `1 GiB`. */
export function mib(value: number): string {
  return value >= 1024 && value % 512 === 0 ? `${value / 1024} GiB` : `${value} MiB`
}

export function shortDigest(digest: string): string {
  return digest.replace(/^sha256:/, '').slice(0, 12)
}

export function plural(count: number, one: string, many = `${one}s`): string {
  return `${count} ${count === 1 ? one : many}`
}

/** Quotes a word for a POSIX shell, only when it needs it. */
export function shellQuote(word: string): string {
  return /^[A-Za-z0-9_\-./:=@%+,]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`
}
