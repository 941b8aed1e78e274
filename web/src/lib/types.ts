// The public API's shapes as the console uses them. Enums are open: the server may add values.

type Open<T extends string> = T | (string & {})

export type WorkloadState = Open<'queued' | 'starting' | 'running' | 'restarting' | 'stopping' | 'stopped' | 'failed' | 'unreachable' | 'deleting' | 'deleted'>
export type Placement = Open<'warm' | 'cold' | 'queued'>

export interface Page<T> {
  items: T[]
  next_cursor: string | null
}
export interface User {
  id: string
  email: string
}
export interface Org {
  id: string
  slug: string
  name: string
  role: Open<'owner' | 'member'>
  tier: string
}
export interface Me {
  user: User | null
  orgs: Org[]
}
export interface Session {
  id: string
  created_at: string
  last_seen_at: string | null
  expires_at: string
  user_agent: string | null
  ip: string | null
  current: boolean
}
export interface Member {
  user_id: string
  email: string
  role: Open<'owner' | 'member'>
  created_at: string
}
export interface ApiKey {
  id: string
  name: string
  prefix: string
  created_at: string
  expires_at: string | null
  last_used_at: string | null
}
export interface CreatedApiKey extends ApiKey {
  /** Null when the request was repeated: the first answer had it. */
  key: string | null
}
export interface Tier {
  name: string
  memory_mib: number
  memory_burst_mib: number
  cpu_shares: number
  cpu_millis: number
  pids: number
  max_workloads: number
  volume_mib: number
  rate_per_min: number
}
export interface Port {
  name: string
  port: number
  protocol: Open<'http' | 'tcp' | 'udp'>
}
export interface Volume {
  path: string
  size_mib: number
}
export interface Template {
  name: string
  title: string
  description: string
  icon: string
  image: string
  warm_mode: Open<'exec' | 'app' | 'frozen' | 'none'>
  least_memory_mib: number
  ports: Port[]
  env: Record<string, string>
  volume: Volume | null
  config_schema: unknown
  unavailable: string | null
}
export interface Reason {
  code: string
  message: string
  hint: string | null
  log_tail: string[]
}
export interface Step {
  name: string
  ms: number
}
export interface Queue {
  position: number
  estimate_ms: number | null
}
export interface SecretRef {
  name: string
  env?: string | null
  file?: string | null
  version?: number | null
}
export interface FileEntry {
  path: string
  content: string
  mode?: number | null
}
export interface Config {
  env: Record<string, string>
  secrets: SecretRef[]
  files: FileEntry[]
  argv?: string[] | null
  ports?: Port[] | null
  volume?: Volume | null
  uid?: number | null
}
export interface Image {
  ref: string
  digest: string | null
}
export interface Change {
  /** Such as `env.LOG_LEVEL`, `secrets.OPENAI_API_KEY.env OPENAI_API_KEY`, `image`. */
  field: string
  before: string | null
  after: string | null
}
export interface Release {
  id: string
  number: number
  image: Image
  config: Config
  created_at: string
  created_by: string | null
  diff: Change[]
}
export interface Instance {
  id: string
  workload_id: string
  release_id: string
  placement: Placement
  state: string
  reason: Reason | null
  queued_at: string | null
  started_at: string | null
  ready_at: string | null
  ended_at: string | null
  restarts: number
  exit_code: number | null
  steps: Step[]
  total_ms: number | null
}
export interface Workload {
  id: string
  name: string
  org_id: string
  template: string | null
  image: Image
  tier: string
  state: WorkloadState
  reason: Reason | null
  desired: Open<'running' | 'stopped' | 'deleted'>
  url: string | null
  warm: Open<'prefer' | 'require' | 'never'>
  release: Release
  instance: Instance | null
  queue: Queue | null
  resource_version: string
  generation: number
  created_at: string
  updated_at: string
}
export interface Access {
  url: string | null
  token: string | null
}
export interface PlacementReport {
  kind: Placement
  steps: Step[]
  total_ms: number
  queue: Queue | null
}
export interface Deployed {
  workload: Workload
  access: Access
  placement: PlacementReport
}
export interface CreateWorkload {
  name?: string
  template?: string
  image?: string
  tier?: string
  config?: Partial<Config>
  warm?: 'prefer' | 'require' | 'never'
}
export interface EventItem {
  id: string
  seq: number
  kind: string
  message: string
  at: string
  workload_id: string | null
  instance_id: string | null
  data: Record<string, unknown>
}
export interface Secret {
  id: string
  name: string
  version: number
  created_at: string
  updated_at: string
}
export interface SecretVersion {
  version: number
  created_at: string
  created_by: string | null
}
export interface LogLine {
  ts: string
  stream: Open<'stdout' | 'stderr'>
  line: string
}
