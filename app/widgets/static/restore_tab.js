() => {
  const chosen = window.flatloraChosen, kept = localStorage.getItem(__KEY__);
  (window.flatloraRestored ??= new Set()).add(__KEY__);
  if (chosen) localStorage.setItem(__KEY__, chosen);
  return !chosen && __NAMES__.includes(kept) ? {__type__: 'update', selected: kept} : {__type__: 'update'};
}
