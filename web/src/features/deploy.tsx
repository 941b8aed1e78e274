import { useQuery, useQueryClient } from '@tanstack/react-query'
import { Link, useNavigate } from '@tanstack/react-router'
import { ArrowRight, ArrowUpRight, Check, CornerDownLeft, Dices, Flame, Snowflake, TriangleAlert } from 'lucide-react'
import { useEffect, useMemo, useRef, useState } from 'react'
import { TemplateArt } from '@/components/template-art'
import { Waterfall } from '@/components/waterfall'
import { Button, buttonStyles, Spinner } from '@/components/ui/button'
import { Field, Input, Textarea } from '@/components/ui/field'
import { Badge, Card, CodeBlock, CopyButton, PageHeader, PlacementBadge, Skeleton, StateLabel } from '@/components/ui/misc'
import { ErrorState, ProblemNote } from '@/components/ui/problem'
import { api, idempotencyKey } from '@/lib/api'
import { cn } from '@/lib/cn'
import { deployCurl } from '@/lib/curl'
import { parseDotenv } from '@/lib/dotenv'
import { duration, mib, plural, roughly } from '@/lib/format'
import { fieldErrors, imageRef } from '@/lib/forms'
import { nameProblem, suggestName } from '@/lib/names'
import { ApiError, asApiError } from '@/lib/problem'
import { keys, meQuery, templatesQuery, tiersQuery, workloadQuery, workloadsQuery } from '@/lib/queries'
import { isTransient, logSource } from '@/lib/states'
import { useTitle } from '@/lib/title'
import type { CreateWorkload, Deployed, Template, Tier } from '@/lib/types'
import { LogPreview } from './log-preview'

const IMAGE = '(image)'

interface Attempt {
  key: string
  body: CreateWorkload & { name: string }
  started: number
}

export function DeployPage({ org, first, initialTemplate }: { org: string; first: boolean; initialTemplate: string | undefined }) {
  const [attempt, setAttempt] = useState<Attempt | null>(null)
  const [result, setResult] = useState<Deployed | null>(null)
  const [error, setError] = useState<unknown>(null)
  const client = useQueryClient()

  const run = async (next: Attempt) => {
    setAttempt(next)
    setError(null)
    setResult(null)
    try {
      const deployed = await api.deploy(org, next.body, next.key)
      client.setQueryData(keys.workload(org, deployed.workload.name), deployed.workload)
      void client.invalidateQueries({ queryKey: keys.workloads(org) })
      setResult(deployed)
    } catch (e) {
      setError(e)
    }
  }
  // A refusal of what was typed goes back to the form; anything later stays on the progress view, where it can be repeated.
  const refusal = error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 408 && error.status !== 429
  if (attempt && !refusal)
    return (
      <Progress
        org={org}
        attempt={attempt}
        result={result}
        error={error}
        onRetry={() => void run(attempt)}
        onAgain={() => {
          setAttempt(null)
          setError(null)
          setResult(null)
        }}
      />
    )
  return <DeployForm org={org} first={first} initial={attempt?.body ?? null} initialTemplate={initialTemplate} error={error} onDeploy={(body) => void run({ key: idempotencyKey(), body, started: performance.now() })} />
}

function DeployForm(props: {
  org: string
  first: boolean
  initial: (CreateWorkload & { name: string }) | null
  initialTemplate: string | undefined
  error: unknown
  onDeploy: (body: CreateWorkload & { name: string }) => void
}) {
  const { org, initial } = props
  useTitle('Deploy')
  const me = useQuery(meQuery)
  const templates = useQuery(templatesQuery)
  const tiers = useQuery(tiersQuery)
  const workloads = useQuery(workloadsQuery(org))
  const orgTier = me.data?.orgs.find((o) => o.slug === org)?.tier

  const taken = useMemo(() => new Set(workloads.data?.map((w) => w.name)), [workloads.data])
  const [choice, setChoice] = useState(initial ? (initial.template ?? IMAGE) : (props.initialTemplate ?? 'hello'))
  const [image, setImage] = useState(initial?.image ?? '')
  const [port, setPort] = useState(String(initial?.config?.ports?.[0]?.port ?? ''))
  const [name, setName] = useState(() => initial?.name ?? suggestName(new Set(namesOf(workloads.data))))
  const [chosenTier, setTier] = useState<string | null>(initial?.tier ?? null)
  const [env, setEnv] = useState(() => Object.entries(initial?.config?.env ?? {}).map(([k, v]) => `${k}=${v}`).join('\n'))
  const [tried, setTried] = useState(false)
  const nameRef = useRef<HTMLInputElement>(null)

  const refused = props.error === null ? undefined : asApiError(props.error)
  const template = templates.data?.find((t) => t.name === choice)
  const tierList = tiers.data ?? []
  const orgRank = tierList.findIndex((t) => t.name === orgTier)
  const blocked = (tier: Tier, index: number) => tierBlock(tier, template, orgRank >= 0 && index > orgRank)
  const fallback = tierList.find((t, i) => t.name === orgTier && !blocked(t, i)) ?? tierList.find((t, i) => !blocked(t, i))
  const tier = chosenTier && tierList.some((t, i) => t.name === chosenTier && !blocked(t, i)) ? chosenTier : fallback?.name
  const noTier = tierList.length > 0 && tier === undefined

  const parsed = parseDotenv(env)
  const portNumber = port.trim() === '' ? undefined : Number(port)
  const problems = {
    name: nameProblem(name) ?? (taken.has(name) ? 'There is one of that name already' : undefined),
    image: choice === IMAGE ? fieldErrors(imageRef, image)[''] : undefined,
    port: choice === IMAGE && portNumber !== undefined && !(Number.isInteger(portNumber) && portNumber >= 1 && portNumber <= 65535) ? 'A number from 1 to 65535' : undefined,
    env: parsed.bad.length > 0 ? `Line ${parsed.bad.join(', ')}: not KEY=value` : undefined,
  }
  const invalid = Object.values(problems).some(Boolean)
  const body: CreateWorkload & { name: string } = {
    name,
    ...(choice === IMAGE ? { image: image.trim() } : { template: choice }),
    ...(tier ? { tier } : {}),
  }
  const config: NonNullable<CreateWorkload['config']> = {}
  if (parsed.pairs.length > 0) config.env = Object.fromEntries(parsed.pairs.map((p) => [p.key, p.value]))
  if (choice === IMAGE && portNumber !== undefined && !problems.port) config.ports = [{ name: 'http', port: portNumber, protocol: 'http' }]
  if (Object.keys(config).length > 0) body.config = config

  const limit = tierList.find((t) => t.name === orgTier)?.max_workloads
  const full = limit !== undefined && workloads.data !== undefined && workloads.data.length >= limit
  const submit = () => {
    setTried(true)
    if (!invalid && !template?.unavailable && !noTier) props.onDeploy(body)
  }
  if (templates.isError) return <ErrorState error={templates.error} onRetry={() => void templates.refetch()} />
  const shown = (key: keyof typeof problems) => (tried || (key === 'name' && name !== '') || key === 'env' ? problems[key] : undefined) ?? refused?.field(key === 'name' ? '/name' : key === 'image' ? '/image' : key === 'env' ? '/config/env' : '/config/ports')

  return (
    <>
      <PageHeader
        title={props.first ? 'Deploy your first agent' : 'Deploy a workload'}
        description={props.first ? 'Hello is a small real agent. Press Deploy and it answers before you let go of the key.' : 'From a template or any OCI image. It runs isolated, with its own network and limits.'}
      />
      <form
        noValidate
        className="grid grid-cols-[minmax(0,1fr)] items-start gap-8 xl:grid-cols-[minmax(0,1fr)_19rem]"
        onSubmit={(event) => {
          event.preventDefault()
          submit()
        }}
      >
        <div className="min-w-0 space-y-7">
          <fieldset>
            <legend className="mb-2 text-sm font-medium">What</legend>
            <div className="grid gap-3 sm:grid-cols-2 lg:grid-cols-3">
              {templates.data
                ? [...templates.data]
                    .sort((a, b) => rank(a.name) - rank(b.name))
                    .slice(0, 8)
                    .map((t) => <TemplateCard key={t.name} template={t} checked={choice === t.name} onChoose={() => setChoice(t.name)} />)
                : [0, 1].map((i) => <Skeleton key={i} className="h-37 rounded-xl" />)}
              <TemplateCard
                template={{ name: IMAGE, title: 'Any image', description: 'An OCI image from a public registry, started as it is.', icon: 'image', unavailable: null, warm_mode: 'none' }}
                checked={choice === IMAGE}
                onChoose={() => setChoice(IMAGE)}
              />
            </div>
          </fieldset>

          {choice === IMAGE && (
            <div className="grid animate-rise gap-4 sm:grid-cols-[minmax(0,1fr)_9rem]">
              <Field label="Image" hint="Pulled without credentials and pinned to the digest found." error={shown('image')}>
                <Input value={image} onChange={(event) => setImage(event.target.value)} placeholder="ghcr.io/team/agent:1.2" className="font-mono" spellCheck={false} autoCapitalize="off" maxLength={255} />
              </Field>
              <Field label="HTTP port" hint="Empty: none" error={shown('port')}>
                <Input value={port} onChange={(event) => setPort(event.target.value)} inputMode="numeric" placeholder="8080" className="font-mono" />
              </Field>
            </div>
          )}

          <Field
            label="Name"
            hint={`Part of its address: ${name || 'name'}-${org}`}
            error={shown('name')}
          >
            <div className="flex gap-2">
              <NameInput inputRef={nameRef} value={name} onChange={setName} />
              <Button size="icon" aria-label="Suggest another name" title="Suggest another name" onClick={() => setName(suggestName(taken))}>
                <Dices aria-hidden="true" />
              </Button>
            </div>
          </Field>

          <fieldset>
            <legend className="mb-2 text-sm font-medium">Tier</legend>
            <div className="grid grid-cols-2 gap-2 md:grid-cols-4">
              {tierList.length === 0 && [0, 1, 2, 3].map((i) => <Skeleton key={i} className="h-17 rounded-xl" />)}
              {tierList.map((t, index) => {
                const why = blocked(t, index)
                return (
                  <label
                    key={t.name}
                    title={why}
                    className={cn(
                      'relative flex cursor-pointer flex-col rounded-xl border bg-panel px-3 py-2.5 shadow-raised transition-colors has-focus-visible:outline-2 has-focus-visible:outline-offset-2 has-focus-visible:outline-accent',
                      tier === t.name ? 'border-ink ring-1 ring-ink' : 'border-line hover:border-line-strong',
                      why && 'cursor-not-allowed bg-transparent shadow-none',
                    )}
                  >
                    <input type="radio" name="tier" value={t.name} checked={tier === t.name} disabled={why !== undefined} onChange={() => setTier(t.name)} className="sr-only" />
                    <span className={cn('text-sm font-medium capitalize', why && 'text-muted')}>{t.name}</span>
                    <span className="text-xs text-muted">{why ?? `${mib(t.memory_mib)} · ${t.cpu_millis / 1000} vCPU`}</span>
                  </label>
                )
              })}
            </div>
            {noTier && template && (
              <p className="mt-2 flex items-start gap-2 text-sm text-warn-ink">
                <TriangleAlert className="mt-0.5 size-4 shrink-0" aria-hidden="true" />
                <span>
                  {template.title} needs {mib(template.least_memory_mib)} and this organisation is on the {orgTier} plan. The smallest plan that fits is{' '}
                  {tierList.find((t) => t.memory_mib >= template.least_memory_mib)?.name ?? 'none of ours'}.
                </span>
              </p>
            )}
          </fieldset>

          <details className="group" open={env !== ''}>
            <summary className="inline-flex list-none items-center gap-1.5 rounded text-sm text-muted select-none hover:text-ink">
              <svg viewBox="0 0 16 16" className="size-3.5 transition-transform group-open:rotate-90" aria-hidden="true">
                <path d="m6 4 4 4-4 4" fill="none" stroke="currentColor" strokeWidth="1.5" strokeLinecap="round" strokeLinejoin="round" />
              </svg>
              Environment variables
              {parsed.pairs.length > 0 && <Badge>{parsed.pairs.length}</Badge>}
            </summary>
            <Field label="Environment variables" hideLabel className="mt-3" hint="Paste a .env file. Keep passwords and keys in Secrets: they can be added after the deploy." error={shown('env')}>
              <Textarea value={env} onChange={(event) => setEnv(event.target.value)} rows={4} spellCheck={false} placeholder={'LOG_LEVEL=info\nGREETING="Hello there"'} className="font-mono text-xs!" />
            </Field>
          </details>
        </div>

        <div className="min-w-0 space-y-4 xl:sticky xl:top-9">
          <Card className="p-4">
            <div className="flex items-center gap-3">
              <TemplateArt icon={template?.icon ?? (choice === IMAGE ? 'image' : choice)} />
              <div className="min-w-0">
                <p className="truncate text-sm font-semibold">{name || '…'}</p>
                <p className="truncate text-xs text-muted">
                  {choice === IMAGE ? 'Any image' : (template?.title ?? choice)}
                  {tier && (
                    <>
                      {' · '}
                      <span className="capitalize">{tier}</span>
                    </>
                  )}
                </p>
              </div>
            </div>
            {refused && <div className="mt-4"><ProblemNote error={refused} /></div>}
            {template?.unavailable && <p className="mt-4 text-sm text-warn-ink">{template.unavailable}</p>}
            {full && !refused && (
              <p className="mt-4 text-sm text-warn-ink">
                The {orgTier} plan allows {plural(limit, 'workload')}, and you have {workloads.data?.length}. Delete one first.
              </p>
            )}
            <Button type="submit" variant="primary" size="lg" className="mt-4 w-full" disabled={Boolean(template?.unavailable) || noTier}>
              Deploy
              <CornerDownLeft className="opacity-60" aria-hidden="true" />
            </Button>
            <p className="mt-3 text-xs text-muted">
              {template && template.warm_mode !== 'none' ? 'Warm containers wait for this template: it starts in milliseconds.' : 'Starts from cold: usually a second or two once the image is there.'}
            </p>
          </Card>
          <div>
            <p className="mb-1.5 text-xs text-muted">The same from a terminal</p>
            <CodeBlock code={deployCurl(location.origin, org, body)} label="deploy command" />
          </div>
        </div>
      </form>
    </>
  )
}

function namesOf(list: { name: string }[] | undefined): string[] {
  return list?.map((w) => w.name) ?? []
}

function rank(name: string): number {
  return name === 'hello' ? 0 : name === 'openclaw' ? 1 : 2
}

function tierBlock(tier: Tier, template: Template | undefined, abovePlan: boolean): string | undefined {
  if (template && tier.memory_mib < template.least_memory_mib) return `Needs ${mib(template.least_memory_mib)}`
  if (abovePlan) return 'Above your plan'
  return undefined
}

function NameInput({ value, onChange, inputRef }: { value: string; onChange: (value: string) => void; inputRef: React.RefObject<HTMLInputElement | null> }) {
  return (
    <Input
      ref={inputRef}
      value={value}
      onChange={(event) => onChange(event.target.value.toLowerCase().replaceAll(/[\s_]/g, '-'))}
      maxLength={40}
      spellCheck={false}
      autoCapitalize="off"
      autoComplete="off"
      className="font-mono"
    />
  )
}

function TemplateCard({ template, checked, onChoose }: { template: Pick<Template, 'name' | 'title' | 'description' | 'icon' | 'unavailable' | 'warm_mode'>; checked: boolean; onChoose: () => void }) {
  return (
    <label
      className={cn(
        'relative flex min-h-37 cursor-pointer flex-col rounded-xl border bg-panel p-4 shadow-raised transition-colors has-focus-visible:outline-2 has-focus-visible:outline-offset-2 has-focus-visible:outline-accent',
        checked ? 'border-ink ring-1 ring-ink' : 'border-line hover:border-line-strong',
      )}
    >
      <input type="radio" name="template" value={template.name} checked={checked} onChange={onChoose} className="sr-only" />
      <span className="mb-3 flex items-start justify-between">
        <TemplateArt icon={template.icon} />
        {checked && (
          <span aria-hidden="true" className="flex size-4.5 items-center justify-center rounded-full bg-solid text-solid-ink">
            <Check className="size-3" strokeWidth={3} />
          </span>
        )}
      </span>
      <span className="flex items-center gap-2 text-sm font-semibold">
        {template.title}
        {template.warm_mode !== 'none' && !template.unavailable && <Badge tone="accent">warm</Badge>}
      </span>
      <span className="mt-0.5 line-clamp-3 text-xs text-muted">{template.unavailable ?? template.description}</span>
    </label>
  )
}

/** From the press of the button to the first log line. */
function Progress({ org, attempt, result, error, onRetry, onAgain }: { org: string; attempt: Attempt; result: Deployed | null; error: unknown; onRetry: () => void; onAgain: () => void }) {
  const name = attempt.body.name
  const navigate = useNavigate()
  const pending = result === null && error === null
  const [elapsed, setElapsed] = useState(0)
  const [slow, setSlow] = useState(false)
  // The answer names every step. Until it comes, which a cold start makes seconds, the workload itself says how far it is.
  const live = useQuery({ ...workloadQuery(org, name), enabled: slow || result !== null, retry: false, refetchInterval: (query) => (pending || (query.state.data && isTransient(query.state.data.state)) ? 700 : false) })
  const workload = live.data ?? result?.workload
  const placement = result?.placement
  const state = workload?.state ?? 'starting'
  useTitle(result ? `${name} ${state}` : `Deploying ${name}`)

  useEffect(() => {
    if (!pending) return
    const timer = setInterval(() => setElapsed(performance.now() - attempt.started), 100)
    const slowTimer = setTimeout(() => setSlow(true), 900)
    return () => {
      clearInterval(timer)
      clearTimeout(slowTimer)
    }
  }, [pending, attempt.started])

  const steps = placement?.steps.length ? placement.steps : (workload?.instance?.steps ?? [])
  const total = placement && !isTransient(placement.kind === 'queued' ? 'queued' : state) ? placement.total_ms : undefined
  const running = state === 'running' && result !== null
  const failed = state === 'failed'
  const url = result?.access.url ?? workload?.url ?? null
  const open = useRef<HTMLAnchorElement>(null)
  useEffect(() => {
    // The next thing to do is under the finger that pressed Deploy.
    if (running) open.current?.focus({ preventScroll: true })
  }, [running])

  return (
    <div className="mx-auto max-w-2xl">
      <header className="mb-6 flex items-center gap-4">
        <TemplateArt icon={attempt.body.template ?? 'image'} size="xl" />
        <div className="min-w-0 flex-1">
          <h1 tabIndex={-1} className="truncate text-xl font-semibold">
            {error !== null ? `${name} was not deployed` : failed ? `${name} did not start` : running ? `${name} is running` : `Deploying ${name}`}
          </h1>
          <p className="flex flex-wrap items-center gap-x-2 text-sm text-muted" aria-live="polite">
            {pending && !workload && 'Sent. Waiting for the answer…'}
            {pending && workload && <StateLabel state={state} />}
            {result && !running && <StateLabel state={state} />}
            {running && 'Isolated, healthy and yours.'}
          </p>
        </div>
        <p className="text-right" data-testid="deploy-total">
          <span className={cn('block font-mono text-xl font-medium tabular', running && 'text-accent-ink')}>{total !== undefined ? duration(total) : pending ? duration(elapsed) : ''}</span>
          {placement && <PlacementBadge placement={placement.kind} />}
        </p>
      </header>

      {error !== null && (
        <div className="space-y-4">
          <ProblemNote error={error} />
          <div className="flex gap-2">
            <Button variant="primary" onClick={onRetry}>
              Try again
            </Button>
            <Button onClick={onAgain}>Back to the form</Button>
          </div>
          <p className="text-xs text-muted">Trying again repeats the same request with the same key: if the first one got through, you get that workload and no second one.</p>
        </div>
      )}

      {error === null && (
        <Card className="overflow-hidden">
          <div className="p-4">
            {steps.length > 0 ? (
              <div className="animate-rise" data-testid="deploy-steps">
                <Waterfall steps={steps} {...(placement ? { placement: placement.kind } : {})} />
                {placement && <PlacementNote kind={placement.kind} />}
              </div>
            ) : (
              <Pending state={workload?.state} placement={workload?.instance?.placement} queue={workload?.queue ?? placement?.queue ?? null} elapsed={elapsed} />
            )}
          </div>
          {failed && workload?.reason && (
            <div className="border-t border-line bg-bad-soft/60 px-4 py-4">
              <p className="text-sm font-medium text-bad-ink">{workload.reason.message}</p>
              {workload.reason.hint && <p className="mt-0.5 text-sm text-ink-2">{workload.reason.hint}</p>}
            </div>
          )}
          {running && (
            <dl className="divide-y divide-line border-t border-line text-sm">
              {url && (
                <div className="flex items-center gap-3 px-4 py-2.5">
                  <dt className="w-20 shrink-0 text-muted">Address</dt>
                  <dd className="flex min-w-0 flex-1 items-center gap-1">
                    <a href={url} target="_blank" rel="noreferrer" className="min-w-0 truncate font-mono text-xs underline decoration-line-strong underline-offset-4 hover:decoration-ink">
                      {url}
                    </a>
                    <CopyButton text={url} label="Copy address" className="shrink-0" />
                  </dd>
                </div>
              )}
              {result.access.token && <TokenRow token={result.access.token} />}
            </dl>
          )}
          {workload && (running || (failed && (logSource(workload) !== null || (workload.reason?.log_tail.length ?? 0) > 0))) && <LogPreview org={org} workload={name} instance={logSource(workload)} tail={workload.reason?.log_tail ?? []} />}
        </Card>
      )}

      {result && (
        <div className="mt-5 flex flex-wrap items-center gap-2">
          {running && url && (
            <a ref={open} href={url} target="_blank" rel="noreferrer" className={buttonStyles({ variant: 'primary', size: 'lg' })}>
              Open it
              <ArrowUpRight aria-hidden="true" />
            </a>
          )}
          <Link to="/orgs/$org/workloads/$workload" params={{ org, workload: name }} className={buttonStyles({ size: 'lg' })}>
            Go to the workload
            <ArrowRight aria-hidden="true" />
          </Link>
          <Button variant="ghost" size="lg" onClick={() => { onAgain(); void navigate({ to: '/orgs/$org/deploy', params: { org } }) }}>
            Deploy another
          </Button>
        </div>
      )}
    </div>
  )
}

function TokenRow({ token }: { token: string }) {
  const [shown, setShown] = useState(false)
  return (
    <div className="flex items-baseline gap-3 bg-accent-soft/50 px-4 py-3.5">
      <dt className="w-20 shrink-0 text-muted">Token</dt>
      <dd className="min-w-0 flex-1">
        <div className="flex items-center gap-1.5">
          <code className="min-w-0 flex-1 truncate rounded-md border border-line bg-panel px-2 py-1 font-mono text-xs" data-testid="access-token">
            {shown ? token : '•'.repeat(Math.min(token.length, 32))}
          </code>
          <Button size="sm" onClick={() => setShown(!shown)}>
            {shown ? 'Hide' : 'Show'}
          </Button>
          <CopyButton text={token} label="Copy token" size="sm" />
        </div>
        <p className="mt-2 text-xs text-ink-2">Made for this workload alone, and shown this once. Copy it now: it cannot be read again.</p>
      </dd>
    </div>
  )
}

function PlacementNote({ kind }: { kind: string }) {
  const warm = kind === 'warm'
  if (!warm && kind !== 'cold') return null
  const Icon = warm ? Flame : Snowflake
  return (
    <p className="mt-4 flex items-center gap-2 text-xs text-muted">
      <Icon className={cn('size-3.5', warm ? 'text-accent-ink' : 'text-info-ink')} aria-hidden="true" />
      {warm ? 'Placed warm: the container was waiting before you came.' : 'Placed cold: no warm container fitted, so a new one was made.'}
    </p>
  )
}

/** What is known while the answer is on its way. Rows are the stages every deploy passes. */
function Pending({ state, placement, queue, elapsed }: { state: string | undefined; placement: string | undefined; queue: { position: number; estimate_ms: number | null } | null; elapsed: number }) {
  const reached = state === undefined ? 0 : state === 'queued' ? 1 : 2
  const rows = ['Accepted', state === 'queued' ? `In the queue${queue ? `, place ${queue.position}${queue.estimate_ms ? `, about ${roughly(queue.estimate_ms)}` : ''}` : ''}` : placement ? `Placed ${placement}` : 'Placed', 'Starting the process', 'Answering']
  const waiting =
    elapsed < 3000 ? null : state === 'queued' ? 'It starts by itself as soon as there is room. You can leave this page.' : elapsed < 30_000 ? 'No warm container fitted, so one is being made; a new image is fetched first.' : 'It takes longer than the server waits. Its state is read every second; you can leave this page.'
  return (
    <>
    <ol className="space-y-2.5">
      {rows.map((row, index) => (
        <li key={index} className={cn('flex items-center gap-3 text-sm', index > reached && 'text-muted')}>
          <span aria-hidden="true" className="flex size-4 items-center justify-center">
            {index < reached ? <Check className="size-4 text-ok-ink" /> : index === reached ? <Spinner className="text-accent-ink" /> : <span className="size-1.5 rounded-full bg-line-strong" />}
          </span>
          {row}
        </li>
      ))}
    </ol>
      {waiting && <p className="mt-4 text-xs text-muted">{waiting}</p>}
    </>
  )
}
