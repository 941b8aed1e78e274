import { useEffect } from 'react'

/** Names the page in the browser's tab and for screen readers. */
export function useTitle(...parts: (string | undefined)[]): void {
  const title = [...parts.filter(Boolean), 'ClawHQ'].join(' · ')
  useEffect(() => {
    document.title = title
  }, [title])
}
