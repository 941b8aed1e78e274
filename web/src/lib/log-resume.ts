/**
 * Remembers where a log stream broke off. A line's id is its moment in milliseconds, and a stream that goes on after it may
 * repeat the lines of that very millisecond: as many of them as were seen already are left out.
 */
export class LogResume {
  private lastId = ''
  private atLast = 0
  private repeats = 0

  /** The id to resume after; empty at the beginning. */
  get after(): string {
    return this.lastId
  }

  /** A new connection begins: lines of the last millisecond may come again. */
  reconnected(): void {
    this.repeats = this.atLast
  }

  /** Whether the line with this id is a new one. */
  accept(id: string): boolean {
    if (id === '') return true
    if (id === this.lastId) {
      if (this.repeats > 0) {
        this.repeats--
        return false
      }
      this.atLast++
      return true
    }
    this.repeats = 0
    this.lastId = id
    this.atLast = 1
    return true
  }
}
