{{- /* Names. KubeRay puts up to 17 characters behind the name of a RayService, and 63 is the limit: 30 leave room. */}}
{{- define "manta.name" -}}
{{- $default := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name (default .Chart.Name .Values.nameOverride)) -}}
{{- $name := default $default .Values.fullnameOverride -}}
{{- if gt (len $name) 30 -}}
{{- printf "%s-%s" (trunc 23 $name | trimSuffix "-") (sha256sum $name | trunc 6) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{- define "manta.selector" -}}
app.kubernetes.io/name: manta
app.kubernetes.io/instance: {{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "manta.labels" -}}
{{ include "manta.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "manta.tokensSecret" -}}
{{- default (printf "%s-tokens" (include "manta.name" .)) .Values.tokens.existingSecret -}}
{{- end -}}

{{- define "manta.homeClaim" -}}
{{- default (printf "%s-home" (include "manta.name" .)) .Values.storage.home.existingClaim -}}
{{- end -}}

{{- define "manta.headAccount" -}}
{{- default (printf "%s-head" (include "manta.name" .)) .Values.serviceAccount.headName -}}
{{- end -}}

{{- define "manta.workerAccount" -}}
{{- default (printf "%s-worker" (include "manta.name" .)) .Values.serviceAccount.workerName -}}
{{- end -}}

{{- /* What KubeRay calls the Service of the front end. */}}
{{- define "manta.frontendService" -}}
{{ include "manta.name" . }}-serve-svc
{{- end -}}

{{- /* REGISTRY/REPOSITORY:TAG or @DIGEST, of a dict with root, repository, tag, digest and perhaps registry. */}}
{{- define "manta.imageOf" -}}
{{- $registry := default (default "" .registry) .root.Values.imageRegistry -}}
{{- $name := empty $registry | ternary .repository (printf "%s/%s" $registry .repository) -}}
{{- if .digest -}}{{ $name }}@{{ .digest }}{{- else -}}{{ $name }}:{{ .tag }}{{- end -}}
{{- end -}}

{{- /* The image of Manta, of a dict with root and variant (cpu, cuda). */}}
{{- define "manta.image" -}}
{{- $image := .root.Values.image -}}
{{- $tag := printf "%s-%s" (default .root.Chart.AppVersion $image.tag) .variant -}}
{{- include "manta.imageOf" (dict "root" .root "repository" $image.repository "tag" $tag "digest" (get $image.digests .variant)) -}}
{{- end -}}

{{- /* A value of a Secret as base64: what the cluster has, else what is given; so an upgrade changes nothing. */}}
{{- define "manta.kept" -}}
{{- $there := (lookup "v1" "Secret" .root.Release.Namespace .secret).data | default dict -}}
{{- get $there .key | default (.new | b64enc) -}}
{{- end -}}
