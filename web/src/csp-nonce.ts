// Libraries that make <style> elements (xterm, Base UI) take no nonce. The policy allows styles from this origin or with
// this response's nonce, so each style element gets it at creation, before anything can insert it.
const nonce = document.querySelector<HTMLMetaElement>('meta[property="csp-nonce"]')?.nonce

if (nonce) {
  const create = document.createElement.bind(document)
  document.createElement = ((tag: string, options?: ElementCreationOptions) => {
    const element = create(tag, options)
    if (tag.toLowerCase() === 'style') element.setAttribute('nonce', nonce)
    return element
  }) as typeof document.createElement
}

export {}
