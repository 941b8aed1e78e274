import { lazy, Suspense, useState } from 'react'
import type { DialogProps } from './dialog-impl'

const load = () => import('./dialog-impl')
const Impl = lazy(load)

/** A modal dialog. Its machinery is fetched when the first one opens, and stays mounted after so that closing is animated. */
export function Dialog(props: DialogProps) {
  const [used, setUsed] = useState(props.open)
  if (props.open && !used) setUsed(true)
  if (!used && !props.open) return null
  return (
    <Suspense>
      <Impl {...props} />
    </Suspense>
  )
}

/** Fetches what dialogs and menus need while nothing else happens, so that the first one opens at once. */
export function preloadOverlays(): void {
  const idle = (run: () => void) => (typeof requestIdleCallback === 'function' ? requestIdleCallback(run, { timeout: 4000 }) : setTimeout(run, 1500))
  idle(() => {
    // A failure here costs nothing: the same file is asked for again when it is needed.
    void load().catch(() => undefined)
    void import('./menu-popup').catch(() => undefined)
  })
}
