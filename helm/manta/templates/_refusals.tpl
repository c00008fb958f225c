{{- /* Combinations that values.schema.json cannot judge: each fails with what was got and what to do. */}}
{{- define "manta.refuse" -}}
{{- $v := .Values -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "manta.name" .)) -}}
{{- fail (printf "the release %s would name its objects %s, but names of Services begin with a letter and have no dots: choose another release name, or set fullnameOverride" .Release.Name (include "manta.name" .)) -}}
{{- end -}}
{{- if not $v.image.repository -}}
{{- fail "image.repository is empty: build and push cluster/Dockerfile, then set it to where the image is (registry.example.org/team/manta)" -}}
{{- end -}}
{{- if and (eq $v.database.mode "external") (not $v.database.external.existingSecret) -}}
{{- fail "database.mode is external, but database.external.existingSecret is empty: make a secret with the URL and name it" -}}
{{- end -}}
{{- if and (eq $v.database.mode "bundled") $v.database.external.existingSecret -}}
{{- fail "database.external.existingSecret is set, but database.mode is bundled: set database.mode to external, or remove the secret" -}}
{{- end -}}
{{- if and (eq $v.gcs.faultTolerance "external") (not (and $v.gcs.external.address $v.gcs.external.existingSecret)) -}}
{{- fail "gcs.faultTolerance is external, but gcs.external.address or gcs.external.existingSecret is empty: set both" -}}
{{- end -}}
{{- if and (ne $v.gcs.faultTolerance "external") $v.gcs.external.existingSecret -}}
{{- fail (printf "gcs.external.existingSecret is set, but gcs.faultTolerance is %s: set gcs.faultTolerance to external, or remove the secret" $v.gcs.faultTolerance) -}}
{{- end -}}
{{- range $v.jobs.submitters -}}
{{- if and (eq .kind "ServiceAccount") (not .namespace) -}}
{{- fail (printf "jobs.submitters names the ServiceAccount %s without namespace, which RBAC needs: set its namespace" .name) -}}
{{- end -}}
{{- end -}}
{{- if and $v.tracing.headersSecret (not $v.tracing.endpoint) -}}
{{- fail "tracing.headersSecret is set, but tracing.endpoint is empty, so nothing would be sent: set the endpoint, or remove the secret" -}}
{{- end -}}
{{- $data := list -}}{{- $paths := list "/tmp" "/var/lib/manta" "/etc/manta" "/opt/manta" "/dev/shm" -}}
{{- range $v.storage.data -}}
{{- if has .name $data -}}{{- fail (printf "storage.data has two entries named %s: give each its own name" .name) -}}{{- end -}}
{{- $path := trimSuffix "/" .mountPath -}}
{{- range $paths -}}
{{- if or (eq $path .) (hasPrefix (printf "%s/" .) $path) (hasPrefix (printf "%s/" $path) .) -}}
{{- fail (printf "storage.data is mounted at %s, but %s is taken: choose another path, such as /data/NAME" $path .) -}}
{{- end -}}
{{- end -}}
{{- $data = append $data .name -}}{{- $paths = append $paths $path -}}
{{- end -}}
{{- $names := list -}}
{{- range $v.workers -}}
{{- if has .name $names -}}{{- fail (printf "workers has two groups named %s: give each its own name" .name) -}}{{- end -}}
{{- $names = append $names .name -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "workers.%s has minReplicas %d above maxReplicas %d: swap them" .name (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if and (not $v.autoscaling.enabled) (eq (int .minReplicas) 0) -}}
{{- fail (printf "workers.%s has minReplicas 0 and autoscaling is off, so it would never have a pod: raise minReplicas, or set autoscaling.enabled" .name) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.storage.home.accessMode "ReadWriteOnce") (not $v.storage.home.existingClaim) -}}
{{- range $v.workers -}}
{{- if .nodeSelector -}}
{{- fail (printf "storage.home.accessMode is ReadWriteOnce, which all pods share on one node only, but workers.%s selects nodes of its own: use ReadWriteMany" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $v.ingress.enabled -}}
{{- if not $v.ingress.host -}}{{- fail "ingress.enabled needs ingress.host: set the host name" -}}{{- end -}}
{{- if not (or $v.ingress.tlsSecret $v.ingress.tlsElsewhere) -}}
{{- fail "ingress.enabled without TLS would send tokens in the clear: set ingress.tlsSecret, or ingress.tlsElsewhere where something in front of it ends TLS" -}}
{{- end -}}
{{- end -}}
{{- if and $v.gateway.enabled (not (and $v.gateway.parent.name $v.gateway.host)) -}}
{{- fail "gateway.enabled needs gateway.parent.name and gateway.host: name the Gateway and the host" -}}
{{- end -}}
{{- if and (or $v.ingress.enabled $v.gateway.enabled) $v.networkPolicy.enabled (not $v.networkPolicy.frontendFrom) -}}
{{- fail "the front end is to be reached from outside, but networkPolicy.frontendFrom is empty: name the namespace of the Ingress controller or Gateway" -}}
{{- end -}}
{{- if and $v.monitoring.serviceMonitor $v.networkPolicy.enabled (not $v.networkPolicy.metricsFrom) -}}
{{- fail "monitoring.serviceMonitor is set, but networkPolicy.metricsFrom is empty, so nothing could be scraped: name the namespace of Prometheus" -}}
{{- end -}}
{{- if and (not $v.serviceAccount.create) (not (and $v.serviceAccount.headName $v.serviceAccount.workerName)) -}}
{{- fail "serviceAccount.create is off: set serviceAccount.headName and serviceAccount.workerName to accounts that are there" -}}
{{- end -}}
{{- if and $v.kueue.priorityClass (not $v.kueue.queue) -}}
{{- fail "kueue.priorityClass is set without kueue.queue: name the LocalQueue" -}}
{{- end -}}
{{- end -}}
