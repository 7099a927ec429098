() => {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(__KEY__)) || {}; } catch (error) {}
  (window.flatloraRestored ??= new Set()).add(__KEY__);
  return __NAMES__.map((name) => kept[name] ?? {__type__: 'update'});
}
