// Preferences of this browser. Storage may be forbidden or full; the console then forgets, and works.

export function readPref(key: string): string | null {
  try {
    return localStorage.getItem(`clawhq.${key}`)
  } catch {
    return null
  }
}

export function writePref(key: string, value: string): void {
  try {
    localStorage.setItem(`clawhq.${key}`, value)
  } catch {
    // Nothing to do: the preference lasts for this page.
  }
}
