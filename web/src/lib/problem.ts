/** One failed field of a request; `pointer` is a JSON Pointer into the request's body. */
export interface FieldProblem {
  pointer: string
  detail: string
}

/** What went wrong, in the terms of an RFC 9457 problem document, or of the network when no answer came. */
export class ApiError extends Error {
  readonly status: number
  readonly code: string
  readonly title: string
  /** What to do about it. */
  readonly hint: string | undefined
  readonly requestId: string | undefined
  readonly errors: FieldProblem[]
  readonly retryAfterMs: number | undefined

  constructor(init: {
    status: number
    code: string
    title: string
    detail?: string | undefined
    hint?: string | undefined
    requestId?: string | undefined
    errors?: FieldProblem[] | undefined
    retryAfterMs?: number | undefined
  }) {
    super(init.detail ?? init.title)
    this.name = 'ApiError'
    this.status = init.status
    this.code = init.code
    this.title = init.title
    this.hint = init.hint
    this.requestId = init.requestId
    this.errors = init.errors ?? []
    this.retryAfterMs = init.retryAfterMs
  }

  /** The problem of the field at `pointer` or below it. */
  field(pointer: string): string | undefined {
    return this.errors.find((e) => e.pointer === pointer || e.pointer.startsWith(`${pointer}/`))?.detail
  }
}

function text(value: unknown): string | undefined {
  return typeof value === 'string' && value !== '' ? value : undefined
}

/** Reads a problem document; anything else (a proxy's page, an empty body) becomes an error that says so. */
export function problemFrom(status: number, body: unknown, headers: Headers): ApiError {
  const doc = (typeof body === 'object' && body !== null ? body : {}) as Record<string, unknown>
  const errors = Array.isArray(doc.errors)
    ? doc.errors.flatMap((entry: unknown) => {
        const e = (entry ?? {}) as Record<string, unknown>
        const detail = text(e.detail)
        return detail ? [{ pointer: text(e.pointer) ?? '', detail }] : []
      })
    : []
  const retryHeader = Number(headers.get('retry-after') ?? Number.NaN)
  return new ApiError({
    status,
    code: text(doc.code) ?? `http_${status}`,
    title: text(doc.title) ?? `The server answered ${status}`,
    detail: text(doc.detail),
    hint: text(doc.hint),
    requestId: text(doc.request_id) ?? headers.get('x-request-id') ?? undefined,
    errors,
    retryAfterMs:
      typeof doc.retry_after_ms === 'number' ? doc.retry_after_ms : Number.isFinite(retryHeader) ? retryHeader * 1000 : undefined,
  })
}

/** Any thrown value as an `ApiError`. */
export function asApiError(error: unknown): ApiError {
  if (error instanceof ApiError) return error
  if (error instanceof DOMException && error.name === 'TimeoutError')
    return new ApiError({ status: 0, code: 'timeout', title: 'No answer in time', detail: 'The server did not answer in time. Nothing is lost: try again.' })
  return new ApiError({
    status: 0,
    code: 'network',
    title: 'Cannot reach ClawHQ',
    detail: 'The request did not get through. Check your connection; the console keeps trying.',
  })
}
