import { infiniteQueryOptions, keepPreviousData, QueryCache, QueryClient, queryOptions } from '@tanstack/react-query'
import { api } from './api'
import { isLive } from './live'
import { ApiError } from './problem'
import { isTransient } from './states'

export const keys = {
  me: ['me'] as const,
  sessions: ['sessions'] as const,
  templates: ['templates'] as const,
  tiers: ['tiers'] as const,
  workloads: (org: string) => ['workloads', org] as const,
  workload: (org: string, wl: string, ...rest: string[]) => ['workload', org, wl, ...rest] as const,
  events: (org: string) => ['events', org] as const,
  secrets: (org: string) => ['secrets', org] as const,
  members: (org: string) => ['members', org] as const,
  apiKeys: (org: string) => ['api-keys', org] as const,
}

export function makeQueryClient(onSignedOut: () => void): QueryClient {
  return new QueryClient({
    queryCache: new QueryCache({
      onError: (error) => {
        if (error instanceof ApiError && error.status === 401) onSignedOut()
      },
    }),
    defaultOptions: {
      queries: {
        staleTime: 5_000,
        gcTime: 10 * 60_000,
        retry: (count, error) => count < 2 && (!(error instanceof ApiError) || error.status === 0 || error.status >= 500),
        retryDelay: (count) => 400 * 2 ** count,
      },
      mutations: { retry: false },
    },
  })
}

// While the event stream lives it says when to read again, and polling is only a net under it.
const pace = (live: number, otherwise: number) => (isLive() ? live : otherwise)

export const meQuery = queryOptions({ queryKey: keys.me, queryFn: ({ signal }) => api.me(signal), staleTime: 60_000 })
export const sessionsQuery = queryOptions({ queryKey: keys.sessions, queryFn: ({ signal }) => api.sessions(signal) })
export const templatesQuery = queryOptions({ queryKey: keys.templates, queryFn: ({ signal }) => api.templates(signal), staleTime: 10 * 60_000 })
export const tiersQuery = queryOptions({ queryKey: keys.tiers, queryFn: ({ signal }) => api.tiers(signal), staleTime: 10 * 60_000 })

export const workloadsQuery = (org: string) =>
  queryOptions({
    queryKey: keys.workloads(org),
    queryFn: ({ signal }) => api.workloads(org, signal),
    refetchInterval: (query) => (query.state.data?.some((w) => isTransient(w.state)) ? 2_000 : pace(30_000, 5_000)),
  })

export const workloadQuery = (org: string, wl: string) =>
  queryOptions({
    queryKey: keys.workload(org, wl),
    queryFn: ({ signal }) => api.workload(org, wl, signal),
    refetchInterval: (query) => (query.state.data && isTransient(query.state.data.state) ? 1_000 : pace(30_000, 5_000)),
  })

export const releasesQuery = (org: string, wl: string) =>
  queryOptions({ queryKey: keys.workload(org, wl, 'releases'), queryFn: ({ signal }) => api.releases(org, wl, signal) })

export const workloadEventsQuery = (org: string, wl: string) =>
  queryOptions({
    queryKey: keys.workload(org, wl, 'events'),
    queryFn: ({ signal }) => api.workloadEvents(org, wl, signal),
    refetchInterval: () => pace(60_000, 5_000),
    placeholderData: keepPreviousData,
  })

export const orgEventsQuery = (org: string) =>
  infiniteQueryOptions({
    queryKey: keys.events(org),
    queryFn: ({ pageParam, signal }) => api.events(org, pageParam || undefined, signal),
    initialPageParam: '',
    getNextPageParam: (last) => last.next_cursor ?? undefined,
    maxPages: 40,
  })

export const secretsQuery = (org: string) =>
  queryOptions({ queryKey: keys.secrets(org), queryFn: ({ signal }) => api.secrets(org, signal) })
export const membersQuery = (org: string) =>
  queryOptions({ queryKey: keys.members(org), queryFn: ({ signal }) => api.members(org, signal) })
export const apiKeysQuery = (org: string) =>
  queryOptions({ queryKey: keys.apiKeys(org), queryFn: ({ signal }) => api.apiKeys(org, signal) })
