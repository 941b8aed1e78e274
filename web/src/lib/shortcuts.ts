import { useEffect, useRef, useSyncExternalStore } from 'react'
import { readPref, writePref } from './storage'

// Single keys can be switched off (WCAG 2.1.4): speech input and some hands press them by accident.
const listeners = new Set<() => void>()

export function singleKeysOn(): boolean {
  return readPref('single-keys') !== 'off'
}
export function setSingleKeys(on: boolean): void {
  writePref('single-keys', on ? 'on' : 'off')
  for (const listener of listeners) listener()
}
export function useSingleKeys(): boolean {
  return useSyncExternalStore(
    (listener) => {
      listeners.add(listener)
      return () => listeners.delete(listener)
    },
    singleKeysOn,
    () => true,
  )
}

/** Whether keys typed there are text or belong to a widget of their own. */
function takesKeys(target: EventTarget | null): boolean {
  if (!(target instanceof Element)) return false
  return target.closest('input, textarea, select, [contenteditable=true], .xterm, [role=dialog], [role=menu]') !== null
}

const SEQUENCE_MS = 900

/**
 * Binds keys while mounted. A name is one key (`n`, `/`, `?`) or two pressed in turn (`g w`). `mod+k` (Ctrl or Command) works
 * in text fields too and cannot be switched off.
 */
export function useShortcuts(bindings: Record<string, () => void>): void {
  const latest = useRef(bindings)
  useEffect(() => {
    latest.current = bindings
  })
  useEffect(() => {
    let first = ''
    let timer: ReturnType<typeof setTimeout> | undefined
    const onKey = (event: KeyboardEvent) => {
      if (event.isComposing || event.altKey || event.defaultPrevented) return
      if (event.ctrlKey || event.metaKey) {
        const run = latest.current[`mod+${event.key.toLowerCase()}`]
        if (run) {
          event.preventDefault()
          run()
        }
        return
      }
      if (takesKeys(event.target) || !singleKeysOn()) return
      const sequence = first === '' ? '' : `${first} ${event.key}`
      const run = latest.current[sequence] ?? latest.current[event.key]
      clearTimeout(timer)
      if (run) {
        first = ''
        event.preventDefault()
        run()
        return
      }
      first = Object.keys(latest.current).some((name) => name.startsWith(`${event.key} `)) ? event.key : ''
      timer = setTimeout(() => {
        first = ''
      }, SEQUENCE_MS)
    }
    addEventListener('keydown', onKey)
    return () => {
      clearTimeout(timer)
      removeEventListener('keydown', onKey)
    }
  }, [])
}
