// The wire of `term.v1`: binary messages are terminal bytes, text messages are control frames in JSON.

export type TermStatus =
  | { kind: 'connecting' }
  | { kind: 'open' }
  | { kind: 'exited'; code: number | null; reason: string | null }
  | { kind: 'lost'; why: string }

/** Bytes shown are acknowledged in steps of this size, so that the server's window (1 MiB) never runs dry. */
export const ACK_STEP = 128 * 1024

export interface Exit {
  code: number | null
  reason: string | null
}

/** Reads a control frame; what is no exit is ignored, as later versions may say more. */
export function readExit(text: string): Exit | undefined {
  let frame: unknown
  try {
    frame = JSON.parse(text)
  } catch {
    return undefined
  }
  if (typeof frame !== 'object' || frame === null) return undefined
  const { type, code, reason, message } = frame as Record<string, unknown>
  if (type !== 'exit') return undefined
  const why = typeof message === 'string' ? message : typeof reason === 'string' && reason !== 'exited' ? reason : null
  return { code: typeof code === 'number' ? code : null, reason: why }
}

/** Counts what was shown and says when to acknowledge how many bytes. */
export class AckCounter {
  private pending = 0

  shown(bytes: number): number | undefined {
    this.pending += bytes
    if (this.pending < ACK_STEP) return undefined
    const ack = this.pending
    this.pending = 0
    return ack
  }
}
