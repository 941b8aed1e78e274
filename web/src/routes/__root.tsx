import type { QueryClient } from '@tanstack/react-query'
import { createRootRouteWithContext, Outlet, useRouter } from '@tanstack/react-router'
import { useEffect, useState } from 'react'

export const Route = createRootRouteWithContext<{ queryClient: QueryClient }>()({ component: Root })

/** `/orgs/acme/workloads/hello/logs` → the part that names the page, without the tab. */
function pageOf(pathname: string): string {
  return /^\/orgs\/[^/]+\/workloads\/[^/]+/.exec(pathname)?.[0] ?? pathname
}

function Root() {
  const router = useRouter()
  const [announcement, setAnnouncement] = useState('')
  useEffect(
    () =>
      router.subscribe('onRendered', ({ fromLocation, toLocation }) => {
        if (!fromLocation || fromLocation.pathname === toLocation.pathname) return
        setAnnouncement(document.title)
        // A new page starts at its heading, as after a page load; a new tab of the same page keeps the focus on the tab.
        if (pageOf(fromLocation.pathname) === pageOf(toLocation.pathname)) return
        const active = document.activeElement
        if (active instanceof HTMLInputElement || active instanceof HTMLTextAreaElement) return
        document.querySelector<HTMLElement>('main h1')?.focus({ preventScroll: true })
      }),
    [router],
  )
  return (
    <>
      <Outlet />
      <div className="sr-only" role="status" aria-live="polite">
        {announcement}
      </div>
    </>
  )
}
