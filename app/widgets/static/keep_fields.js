(...now) => {
  // Before the stored values are back, the initial ones must not replace them.
  if (!window.flatloraRestored?.has(__KEY__)) return;
  localStorage.setItem(__KEY__, JSON.stringify(Object.fromEntries(__NAMES__.map((name, place) => [name, now[place]]))));
}
