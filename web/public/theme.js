// Runs before first paint so that the page never flashes the wrong theme. A file of its own because the
// content security policy allows no inline script.
(function () {
  var choice = 'system'
  try {
    choice = localStorage.getItem('clawhq.theme') || 'system'
  } catch (_) {
    // Storage may be forbidden; the system's choice is a good answer then.
  }
  var dark = choice === 'dark' || (choice !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches)
  document.documentElement.classList.toggle('dark', dark)
  document.documentElement.style.colorScheme = dark ? 'dark' : 'light'
  var meta = document.querySelector('meta[name="theme-color"]')
  if (meta) meta.setAttribute('content', dark ? '#121110' : '#fbfaf9')
})()
