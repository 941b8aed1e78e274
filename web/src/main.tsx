import './csp-nonce'
import './index.css'
import { QueryClientProvider } from '@tanstack/react-query'
import { createRouter, RouterProvider } from '@tanstack/react-router'
import { StrictMode } from 'react'
import { createRoot } from 'react-dom/client'
import { RouteError, RouteMissing } from './components/route-states'
import { Toaster } from './components/ui/toast'
import { keys, makeQueryClient } from './lib/queries'
import { routeTree } from './routeTree.gen'

// A tab that was open over a deploy asks for chunks that are gone. One reload brings the new ones; a second failure is shown.
addEventListener('vite:preloadError', (event) => {
  const marker = 'clawhq.reloaded'
  try {
    if (Date.now() - Number(sessionStorage.getItem(marker) ?? 0) < 60_000) return
    sessionStorage.setItem(marker, String(Date.now()))
  } catch {
    return
  }
  event.preventDefault()
  location.reload()
})

const queryClient = makeQueryClient(() => {
  const here = location.pathname
  if (here === '/sign-in' || here === '/sign-up') return
  queryClient.removeQueries({ queryKey: keys.me })
  void router.navigate({ to: '/sign-in', search: { next: here + location.search } })
})

const router = createRouter({
  routeTree,
  context: { queryClient },
  defaultPreload: 'intent',
  defaultPreloadStaleTime: 0,
  defaultPendingMs: 400,
  scrollRestoration: true,
  defaultErrorComponent: RouteError,
  defaultNotFoundComponent: RouteMissing,
})

declare module '@tanstack/react-router' {
  interface Register {
    router: typeof router
  }
}

const root = document.getElementById('root')
if (!root) throw new Error('index.html has no #root')
createRoot(root).render(
  <StrictMode>
    <QueryClientProvider client={queryClient}>
      <RouterProvider router={router} />
      <Toaster />
    </QueryClientProvider>
  </StrictMode>,
)
