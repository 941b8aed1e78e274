/** A browser and system for people, from a User-Agent header; programs keep their own first word. */
export function device(userAgent: string | null): { name: string; mobile: boolean } {
  if (!userAgent) return { name: 'Unknown browser', mobile: false }
  const browser = /Edg\//.test(userAgent) ? 'Edge' : /OPR\//.test(userAgent) ? 'Opera' : /Firefox\//.test(userAgent) ? 'Firefox' : /Chrom(e|ium)\//.test(userAgent) ? 'Chrome' : /Safari\//.test(userAgent) ? 'Safari' : undefined
  const system = /iPhone|iPad/.test(userAgent) ? 'iOS' : /Android/.test(userAgent) ? 'Android' : /Mac OS X/.test(userAgent) ? 'macOS' : /Windows/.test(userAgent) ? 'Windows' : /Linux|X11/.test(userAgent) ? 'Linux' : undefined
  const mobile = /Mobile|iPhone|Android/.test(userAgent)
  if (!browser) return { name: userAgent.split(/[\s/]/)[0] || 'Unknown browser', mobile }
  return { name: system ? `${browser} on ${system}` : browser, mobile }
}
