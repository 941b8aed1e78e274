import { useSyncExternalStore } from 'react'
import { readPref, writePref } from './storage'

export type ThemeChoice = 'system' | 'light' | 'dark'

const listeners = new Set<() => void>()
const media = typeof matchMedia === 'function' ? matchMedia('(prefers-color-scheme: dark)') : undefined

function apply(): void {
  const choice = themeChoice()
  const dark = choice === 'dark' || (choice === 'system' && (media?.matches ?? false))
  const root = document.documentElement
  // Every colour changes at once; hundreds of transitions from one theme to the other would smear.
  root.classList.add('switching')
  root.classList.toggle('dark', dark)
  root.style.colorScheme = dark ? 'dark' : 'light'
  void root.offsetHeight
  requestAnimationFrame(() => root.classList.remove('switching'))
  document.querySelector('meta[name="theme-color"]')?.setAttribute('content', dark ? '#121110' : '#fbfaf9')
  for (const listener of listeners) listener()
}

media?.addEventListener('change', apply)

export function themeChoice(): ThemeChoice {
  const stored = readPref('theme')
  return stored === 'light' || stored === 'dark' ? stored : 'system'
}

export function setTheme(choice: ThemeChoice): void {
  writePref('theme', choice)
  apply()
}

function subscribe(listener: () => void): () => void {
  listeners.add(listener)
  return () => listeners.delete(listener)
}

export function useThemeChoice(): ThemeChoice {
  return useSyncExternalStore(subscribe, themeChoice, () => 'system' as const)
}

/** Whether the page is dark right now, whatever the choice. */
export function useIsDark(): boolean {
  return useSyncExternalStore(subscribe, () => document.documentElement.classList.contains('dark'), () => false)
}
